// All samples of a row, filtered, and the details of one.
let page = 0, selected = null;
const PAGE = 15;

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

data.rows.forEach((row, i) => option("row", i, `${row.run}, ${row.task}`));
option("status", "", "any");
for (const status of new Set(data.blocks.flatMap((b) => [...new Set(b.status)]))) option("status", data.texts[status], data.texts[status]);
const total = data.blocks.reduce((sum, block) => sum + block.id.length, 0);
at("summary").textContent = `${new Set(data.rows.map((r) => r.run)).size} runs, ${data.rows.length} rows, ${total} samples`;
if (data.home) at("summary").append(", ", link(data.home, "leaderboard"));
for (const [id, event] of [["row", "change"], ["status", "change"], ["correct", "change"], ["search", "input"]])
  at(id).addEventListener(event, () => { page = 0; selected = null; samples(); });
at("back").addEventListener("click", () => { page -= 1; samples(); });
at("next").addEventListener("click", () => { page += 1; samples(); });
samples();
window.__ready = performance.now();
