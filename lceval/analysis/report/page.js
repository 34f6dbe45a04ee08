// Tables, filters and theme of the page. Text from runs is only inserted as text.
const show = (v) => v === null || v === undefined ? "-" : typeof v === "number" && !Number.isInteger(v) ? v.toPrecision(3) : String(v);
const percent = (v) => v === null || v === undefined ? "-" : (100 * v).toFixed(1);
const query = (r) => r.query_aware === null ? "-" : r.query_aware ? "query-aware" : "query-agnostic";
const bounded = (of, mid, lo, hi) => mid === null || mid === undefined ? "-" : lo === null || lo === undefined ? of(mid) : `${of(mid)} [${of(lo)}, ${of(hi)}]`;
for (const row of data.rows) {
  row.judged = row.metrics?.judge_sum ?? null;
  row.kappa = !row.judge ? null : row.judge_kappa === null ? "uncalibrated" : bounded((v) => v.toFixed(2), row.judge_kappa, row.judge_kappa_lo, row.judge_kappa_hi);
}
// Heading, sort key, cell text; columns without values are omitted.
const COLUMNS = [
  ["run", "run", (r) => r.run + (r.unfinished ? "*" : "")], ["model", "pretrained"], ["adapter", "peft"], ["recipe", "recipe"], ["query", "query_aware", query], ["task", "task"], ["context", "context"], ["n", "n"],
  ["score [95% CI]", "score", (r) => bounded(r.unit === "share" ? percent : show, r.score, r.ci_lo, r.ci_hi)],
  ["retention %", "retention", (r) => bounded(percent, r.retention, r.retention_lo, r.retention_hi)],
  ["none to full %", "recovered", (r) => bounded(percent, r.recovered, r.recovered_lo, r.recovered_hi)],
  ["gold_nll", "gold_nll"], ["Δ gold_nll vs full", "gold_nll_delta", (r) => bounded(show, r.gold_nll_delta, r.gold_nll_delta_lo, r.gold_nll_delta_hi)], ["gold kept %", "gold_kept", (r) => percent(r.gold_kept)], ["KV kept %", "kept_share", (r) => percent(r.kept_share)], ["KV MB", "kv_mb"],
  ["read MB/step", "bytes_read_per_step", (r) => r.bytes_read_per_step ? show(r.bytes_read_per_step / 1e6) : "-"], ["contexts per GiB", "contexts_per_gib"], ["first token s", "first_token_s"], ["prefill s", "prefill_s"], ["decode tok/s", "decode_tok_s"],
  ["judge", "judge"], ["judge's kappa", "kappa"], ["judged (0 to 3)", "judged"], ["errors", "errors"], ["truncated", "truncated"], ["bad format", "wrong_format"], ["unjudged", "unjudged"],
];
const empty = (v) => v === null || v === undefined || v === 0;
const differs = (key) => new Set(data.rows.map((r) => r[key])).size > 1;
const isText = (key) => key === "query_aware" || data.rows.some((r) => typeof r[key] === "string");
const plainColumn = (key) => [key, key, (r) => typeof r[key] === "object" && r[key] !== null ? JSON.stringify(r[key]) : show(r[key])];
const CONSTANT = ["pretrained", "peft", "context", "task"];
const columns = () => at("every").checked
  ? Object.keys(data.rows[0] || {}).map(plainColumn)
  : COLUMNS.filter(([, key]) => key === "query_aware" ? data.rows.some((r) => r[key]) : CONSTANT.includes(key) ? differs(key) : key === "score" || data.rows.some((r) => !empty(r[key])));
let sorted = null, down = true, page = 0, selected = null;
const PAGE = 15;
const selectedRows = () => data.rows.filter((r) => !at("task").value || r.task === at("task").value);

function board() {
  const rows = selectedRows(), visible = columns();
  if (sorted) rows.sort((a, b) => {
    const [x, y] = [a[sorted], b[sorted]];
    if (x === null || x === undefined) return 1;
    if (y === null || y === undefined) return -1;
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
  });
  const head = make("tr");
  for (const [heading, key] of visible) {
    const cell = make("th", undefined, isText(key) ? "text" : ""), button = make("button", heading);
    cell.scope = "col";
    button.title = data.keys[key] || "";
    if (sorted === key) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    button.addEventListener("click", () => { down = sorted === key ? !down : true; sorted = key; board(); });
    cell.append(button);
    head.append(cell);
  }
  at("board").replaceChildren(head, ...rows.map((row) => {
    const line = make("tr");
    line.append(...visible.map(([, key, text]) => make("td", text ? text(row) : show(row[key]), isText(key) ? "text" : "")));
    return line;
  }));
}

// Score of the same question under full; undefined without a pair.
function underFull(block, i) {
  if (!block.full) return undefined;
  const index = block.full.pairs[i];
  return index === null ? undefined : data.blocks[block.full.block].score[index];
}

function matches(block, i) {
  const score = block.score[i] || 0, kind = at("correct").value, status = at("status").value, full = underFull(block, i);
  if (status && data.texts[block.status[i]] !== status) return false;
  if (kind === "right" && score <= 0 || kind === "wrong" && score > 0) return false;
  if (kind === "lost" && !(full > score) || kind === "won" && !(full < score)) return false;
  const words = at("search").value.toLowerCase();
  return !words || `${data.texts[block.id[i]]}\n${data.texts[block.question[i]]}\n${block.answer[i]}`.toLowerCase().includes(words);
}

function samples() {
  const block = data.blocks[at("row").value];
  if (!block) return;
  const indices = [...block.id.keys()].filter((i) => matches(block, i));
  page = Math.max(0, Math.min(page, Math.ceil(indices.length / PAGE) - 1));
  at("count").textContent = `${indices.length} samples`;
  at("back").disabled = page === 0;
  at("next").disabled = (page + 1) * PAGE >= indices.length;
  at("list").replaceChildren(...indices.slice(page * PAGE, (page + 1) * PAGE).map((i) => {
    const line = make("tr"), name = make("td", undefined, "text"), button = make("button", data.texts[block.id[i]]), score = block.score[i];
    line.setAttribute("aria-selected", String(selected === i));
    button.addEventListener("click", () => { selected = i; samples(); detail(block, i); });
    name.append(button);
    line.append(name, make("td", data.texts[block.status[i]], "text"), make("td", show(score), score > 0 ? "right" : "wrong"), make("td", block.answer[i].slice(0, 110), "text"));
    return line;
  }));
}

function detail(block, i) {
  const full = underFull(block, i);
  const parts = { question: data.texts[block.question[i]], answer: block.answer[i], "gold answers": data.golds[block.gold[i]].join(" | "), score: show(block.score[i]) };
  if (full !== undefined) parts["score under full"] = show(full);
  if (block.gold_kept[i] !== null) parts.gold_kept = show(block.gold_kept[i]);
  if (block.gold_nll[i] !== null) parts.gold_nll = show(block.gold_nll[i]);
  if (block.judge[i]) for (const [key, value] of Object.entries(block.judge[i])) parts[key] = typeof value === "object" ? JSON.stringify(value, null, 1) : show(value);
  parts["end of the prompt"] = data.prompts[block.prompt[i]];
  const telemetry = Object.entries(block.kv).filter(([, values]) => values[i] !== null).map(([key, values]) => `${key} ${show(values[i])}`);
  if (telemetry.length) parts.telemetry = telemetry.join(", ");
  at("detail").scrollIntoView({ block: "nearest" });
  at("detail").replaceChildren(...Object.entries(parts).flatMap(([key, value]) => [make("dt", key), make("dd", value)]));
}

const storedTheme = () => { try { return localStorage.getItem("lceval-theme"); } catch { return null; } };
function theme(name, keep) {
  document.documentElement.dataset.theme = name;
  at("theme").textContent = name === "dark" ? "Light" : "Dark";
  if (keep) try { localStorage.setItem("lceval-theme", name); } catch { /* a page opened from a file may have no storage */ }
}

const option = (id, value, text) => { const element = make("option", text); element.value = value; at(id).append(element); };
option("task", "", "all");
for (const task of new Set(data.rows.map((r) => r.task))) option("task", task, task);
data.rows.forEach((row, i) => option("row", i, `${row.run}, ${row.task}`));
option("status", "", "any");
for (const status of new Set(data.blocks.flatMap((b) => [...new Set(b.status)]))) option("status", data.texts[status], data.texts[status]);
const total = data.blocks.reduce((sum, block) => sum + block.id.length, 0);
at("summary").textContent = `${new Set(data.rows.map((r) => r.run)).size} runs, ${data.rows.length} rows, ${total} samples`;
at("task").addEventListener("change", () => { board(); plots(selectedRows()); });
at("every").addEventListener("change", board);
at("against").addEventListener("change", () => plots(selectedRows()));
for (const [id, event] of [["row", "change"], ["status", "change"], ["correct", "change"], ["search", "input"]])
  at(id).addEventListener(event, () => { page = 0; selected = null; samples(); });
at("back").addEventListener("click", () => { page -= 1; samples(); });
at("next").addEventListener("click", () => { page += 1; samples(); });
at("theme").addEventListener("click", () => { theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark", true); plots(selectedRows()); });
theme(storedTheme() || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"), false);
board();
samples();
window.__ready = performance.now();
// Tables are painted before the plots are drawn.
setTimeout(() => { plots(selectedRows()); window.__drawn = performance.now(); document.body.dataset.drawn = ""; });
