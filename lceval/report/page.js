"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const make = (name, text, kind) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
// Plotly reads a few tags in labels; runs must not write any.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const show = (v) => v === null || v === undefined ? "-" : typeof v === "number" && !Number.isInteger(v) ? v.toPrecision(3) : String(v);
const present = Object.keys(data.rows[0]).filter((key) => data.rows.some((row) => row[key] !== null && row[key] !== undefined));
const isText = (key) => data.rows.some((row) => typeof row[key] === "string");
// A name that is the same in every row says nothing; run, recipe and task always stand.
const columns = present.filter((key) => ["run", "recipe", "task"].includes(key) || !isText(key)
  || new Set(data.rows.map((row) => row[key])).size > 1);
let sorted = null, down = true, page = 0;
const PAGE = 50;

function board() {
  const rows = [...data.rows];
  if (sorted) rows.sort((a, b) => {
    const [x, y] = [a[sorted], b[sorted]];
    if (x === null || x === undefined) return 1;
    if (y === null || y === undefined) return -1;
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
  });
  const head = make("tr");
  for (const key of columns) {
    const cell = make("th", undefined, isText(key) ? "text" : "");
    const button = make("button", key);
    button.title = data.keys[key] || "";
    if (sorted === key) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    button.addEventListener("click", () => { down = sorted === key ? !down : true; sorted = key; board(); });
    cell.append(button);
    head.append(cell);
  }
  at("board").replaceChildren(head, ...rows.map((row) => {
    const line = make("tr");
    line.append(...columns.map((key) => make("td", show(row[key]), isText(key) ? "text" : "")));
    return line;
  }));
}

function memory() {
  const rows = data.rows.filter((row) => row.kv_mb !== null && row.score !== null);
  at("why").hidden = rows.length > 0;
  if (!rows.length) return;
  const ink = getComputedStyle(document.body).color;
  Plotly.newPlot("memory", [{ type: "scatter", mode: "markers+text", x: rows.map((r) => r.kv_mb), y: rows.map((r) => r.score),
    text: rows.map((r) => plain(r.context && r.context !== "full" ? `${r.recipe}, ${r.context}` : r.recipe)), hovertext: rows.map((r) => plain(`${r.run}, ${r.task}`)), textposition: "top center" }],
  { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink }, margin: { t: 20 },
    xaxis: { title: { text: "KV memory, MB per sample" } }, yaxis: { title: { text: "score" } } }, { responsive: true, displaylogo: false });
}

function samples() {
  const block = data.blocks[at("row").value], words = at("search").value.toLowerCase();
  const found = [...block.id.keys()].filter((i) =>
    `${data.texts[block.id[i]]}\n${data.texts[block.question[i]]}\n${block.answer[i]}`.toLowerCase().includes(words));
  page = Math.max(0, Math.min(page, Math.ceil(found.length / PAGE) - 1));
  at("count").textContent = `${found.length} samples`;
  at("list").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map((i) => {
    const line = make("tr"), name = make("td", undefined, "text"), button = make("button", data.texts[block.id[i]]);
    button.addEventListener("click", () => detail(block, i));
    name.append(button);
    line.append(name, make("td", data.texts[block.status[i]], "text"), make("td", show(block.score[i])), make("td", block.answer[i].slice(0, 90), "text"));
    return line;
  }));
}

function detail(block, i) {
  const parts = { question: data.texts[block.question[i]], answer: block.answer[i], "gold answers": data.golds[block.gold[i]].join(" | "),
    gold_kept: show(block.gold_kept[i]), gold_nll: show(block.gold_nll[i]) };
  for (const [key, values] of Object.entries(block.kv)) parts[key] = show(values[i]);
  if (block.judge[i]) parts.judge = JSON.stringify(block.judge[i], null, 1);
  parts["end of the prompt"] = data.prompts[block.prompt[i]];
  at("detail").textContent = Object.entries(parts).map(([key, value]) => `${key}: ${value}`).join("\n");
}

data.rows.forEach((row, i) => { const option = make("option", `${row.run}, ${row.task}`); option.value = i; at("row").append(option); });
at("row").addEventListener("change", () => { page = 0; samples(); });
at("search").addEventListener("input", () => { page = 0; samples(); });
at("back").addEventListener("click", () => { page -= 1; samples(); });
at("next").addEventListener("click", () => { page += 1; samples(); });
board();
samples();
window.__ready = performance.now();
memory();
