// The leaderboard: a table of all rows, sorted by a click on a heading. Text from runs is only inserted as text.
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
let sorted = null, down = true;
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
    line.append(...visible.map(([, key, text]) => {
      const cell = make("td", text ? text(row) : show(row[key]), isText(key) ? "text" : "");
      if (key === "run" && row.page) cell.replaceChildren(link(row.page, cell.textContent));
      return cell;
    }));
    return line;
  }));
}

option("task", "", "all");
for (const task of new Set(data.rows.map((r) => r.task))) option("task", task, task);
at("task").addEventListener("change", () => { board(); changed(); });
at("every").addEventListener("change", board);
board();
