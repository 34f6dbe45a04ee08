"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const make = (name, text, kind) => {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const link = (href, text) => { const element = make("a", text); element.href = href; return element; };
// Plotly interprets some HTML tags in labels; text from runs is untrusted.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const storedTheme = () => { try { return localStorage.getItem("lceval-theme"); } catch { return null; } };
function theme(name, keep) {
  document.documentElement.dataset.theme = name;
  at("theme").textContent = name === "dark" ? "Light" : "Dark";
  if (keep) try { localStorage.setItem("lceval-theme", name); } catch { /* a page opened from a file may have no storage */ }
}
// Parts of a page listen for "rows": other rows are selected, or the colours have changed.
const changed = () => document.dispatchEvent(new Event("rows"));
at("theme").addEventListener("click", () => { theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark", true); changed(); });
theme(storedTheme() || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"), false);
const option = (id, value, text) => { const element = make("option", text); element.value = value; at(id).append(element); };

// Text of cells.
const show = (v) => v === null || v === undefined ? "-" : typeof v === "number" && !Number.isInteger(v) ? v.toPrecision(3) : String(v);
const percent = (v) => v === null || v === undefined ? "-" : (100 * v).toFixed(1);
const query = (r) => r.query_aware === null ? "-" : r.query_aware ? "query-aware" : "query-agnostic";
const bounded = (of, mid, lo, hi) => mid === null || mid === undefined ? "-" : lo === null || lo === undefined ? of(mid) : `${of(mid)} [${of(lo)}, ${of(hi)}]`;
// Of plots.
const COLOURS = ["#2f7bd9", "#d1495b", "#2a9d8f", "#9b6bdf", "#d98a1f", "#7d8896"];
// Pareto-optimal points; `sign` is 1 where less of x is better, else -1; more of `worth` is better.
const pareto = (rows, x, sign, worth = (r) => r.score) => rows.filter((r) => !rows.some((o) =>
  sign * (o[x] - r[x]) <= 0 && worth(o) >= worth(r) && (o[x] !== r[x] || worth(o) !== worth(r)))).sort((a, b) => a[x] - b[x]);
