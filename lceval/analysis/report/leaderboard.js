// The first page of a site: methods by budget, and a plot of the same value against memory, of the selected tasks.
// Value, heading, bounds, whether in percent, whether more is better.
const VALUES = [
  ["score", "score", "ci_lo", "ci_hi", (r) => r.unit === "share", true],
  ["gold_nll_delta", "gold_nll added to full's", "gold_nll_delta_lo", "gold_nll_delta_hi", () => false, false],
  ["gold_nll", "gold_nll", "", "", () => false, false],
  ["recovered", "none to full", "recovered_lo", "recovered_hi", () => true, true],
  ["retention", "retention", "retention_lo", "retention_hi", () => true, true],
];
const amount = (recipe) => (recipe.match(/^[a-z0-9_]+:([0-9.]+|threshold=[^:+]+)/) || [])[1] || "";
// Sparse attention keeps everything: its share is what a step reads.
const budgetOf = (r) => amount(r.recipe) && Number(amount(r.recipe)) < .99 && r.kept_share > .99 ? `reads ${amount(r.recipe)}` : amount(r.recipe);
const method = (r) => [amount(r.recipe) ? r.recipe.replace(`:${amount(r.recipe)}`, "") : r.recipe,
  ...(r.query_aware ? ["query-aware"] : []), ...(r.peft ? [`+${r.peft.split("/").filter(Boolean).pop()}`] : []),
  ...(r.context && r.context !== "full" ? [r.context] : [])].join(" · ");

// The selected value, whether a row has it, and the number in the unit that is shown.
const chosen = () => VALUES.find(([name]) => name === at("value").value);
const has = (r, key) => r[key] !== null && r[key] !== undefined;
const scaled = (r, [key, , , , share]) => (share(r) ? 100 : 1) * r[key];
// The column that methods are sorted by, after full; null is the one with the most methods.
let by = null, reversed = false;

function pivot() {
  const value = chosen(), [key, , lo, hi, share, more] = value;
  const rows = selectedRows().filter((r) => has(r, key));
  const tasks = [...new Set(rows.map((r) => r.task))], order = (x) => x === "" ? 2 : x.startsWith("reads") ? -1 : Number(x) || 0;
  const columns = tasks.flatMap((task) => [...new Set(rows.filter((r) => r.task === task).map(budgetOf))]
    .sort((a, b) => order(b) - order(a)).map((budget, i) => ({ task, budget, first: !i, name: `${task} ${budget}`,
      rows: rows.filter((r) => r.task === task && budgetOf(r) === budget) })));
  const of = (name, column) => column.rows.filter((r) => method(r) === name);
  const best = (column) => column.budget === "" || column.rows.length < 2 ? null
    : (more ? Math.max : Math.min)(...column.rows.map((r) => r[key]));
  const fullest = columns.reduce((a, b) => (b.rows.length > a.rows.length ? b : a), columns[0]);
  const sorting = columns.find((column) => column.name === by) || fullest;
  const rank = (name) => { const [r] = of(name, sorting); return name === "full" ? -Infinity : r ? (more === reversed ? 1 : -1) * r[key] : Infinity; };
  const names = [...new Set(rows.map(method))].sort((a, b) => (rank(a) < rank(b) ? -1 : rank(a) > rank(b) ? 1 : 0));
  const heads = [make("tr"), make("tr")];
  heads[0].append(make("th"), ...tasks.map((task) => {
    const cell = make("th", task, "group");
    cell.colSpan = columns.filter((column) => column.task === task).length;
    cell.scope = "colgroup";
    return cell;
  }));
  heads[1].append(make("th", "method", "text"), ...columns.map((column) => {
    const cell = make("th", undefined, column.first ? "first" : ""), button = make("button", column.budget || "no budget");
    cell.scope = "col";
    if (column === sorting) cell.setAttribute("aria-sort", more === reversed ? "ascending" : "descending");
    button.addEventListener("click", () => { reversed = column === sorting && !reversed; by = column.name; pivot(); });
    cell.append(button);
    return cell;
  }));
  at("pivot").replaceChildren(...heads, ...names.map((name) => {
    const line = make("tr");
    line.append(make("th", name, "text"), ...columns.map((column) => {
      const cell = make("td", undefined, column.first ? "first" : "");
      for (const r of of(name, column)) {
        const text = share(r) ? percent : show, anchor = link(r.page, text(r[key]));
        anchor.title = `${r.run}, ${r.n} samples`;
        if (r[key] === best(column)) anchor.className = "best";
        if (has(r, lo)) anchor.append(make("small", ` [${text(r[lo])}, ${text(r[hi])}]`));
        cell.append(anchor);
      }
      return cell;
    }));
    return line;
  }));
  at("note").textContent = `${more ? "More" : "Less"} is better; 95% intervals over contexts; bold: best of a budget.`;
}

const NAMESPACE = "http://www.w3.org/2000/svg";
function draw(name, attributes, text) {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// The chosen value, better ones higher, against the logarithm of the KV memory of a sample.
function memory() {
  const value = chosen(), [key, name, , , , more] = value;
  const rows = selectedRows().filter((r) => r.kv_mb > 0 && has(r, key));
  if (!rows.length) { at("pareto").replaceChildren(make("p", `No run has both KV telemetry and a value of ${name}.`)); return; }
  const width = Math.max(300, at("pareto").clientWidth), height = 340, left = 45, right = 12, top = 10, bottom = 40;
  const logs = rows.map((r) => Math.log10(r.kv_mb)), low = Math.min(...logs) - .05, high = Math.max(...logs) + .05;
  const values = rows.map((r) => scaled(r, value)), least = Math.min(0, ...values), most = Math.max(...values, least + 1e-9);
  const x = (mb) => left + (Math.log10(mb) - low) / (high - low) * (width - left - right);
  const y = (v) => { const up = (v - least) / (most - least) / 1.1; return height - bottom - (more ? up : 1 - up) * (height - top - bottom); };
  const tasks = [...new Set(rows.map((r) => r.task))];
  const svg = draw("svg", { width, height, role: "img", "aria-label": `${name} against KV memory` });
  const label = (at_x, at_y, anchor, text) => svg.append(draw("text", { x: at_x, y: at_y, "text-anchor": anchor }, text));
  const unit = 10 ** Math.floor(Math.log10((most - least) / 4)), step = [1, 2, 5, 10].find((n) => n * unit * 4 >= most - least) * unit;
  for (let tick = Math.ceil(least / step); tick <= most / step; tick += 1) {
    const v = Number((tick * step).toPrecision(3));
    svg.append(draw("line", { x1: left, x2: width - right, y1: y(v), y2: y(v), class: "grid" }));
    label(left - 6, y(v) + 4, "end", show(v));
  }
  for (let power = Math.floor(low); power <= high; power += 1) for (const mb of [1, 2, 5].map((n) => n * 10 ** power)) {
    if (mb >= 10 ** low && mb <= 10 ** high) label(x(mb), height - bottom + 16, "middle", show(Number(mb.toPrecision(1))));
  }
  label((left + width - right) / 2, height - bottom + 32, "middle", "KV cache, MB per sample");
  tasks.forEach((task, i) => {
    const shade = COLOURS[i % COLOURS.length], own = rows.filter((r) => r.task === task);
    const best = pareto(own, "kv_mb", 1, (r) => (more ? 1 : -1) * r[key]);
    svg.append(draw("polyline", { points: best.map((r) => `${x(r.kv_mb)},${y(scaled(r, value))}`).join(" "), fill: "none", stroke: shade, "stroke-dasharray": "2 3" }));
    for (const r of own) {
      const anchor = draw("a", { href: r.page });
      const point = draw("circle", { cx: x(r.kv_mb), cy: y(scaled(r, value)), r: best.includes(r) ? 6 : 4, stroke: shade, fill: best.includes(r) ? shade : "transparent" });
      point.append(draw("title", {}, `${r.recipe}, ${task}: ${name} ${show(scaled(r, value))} at ${show(r.kv_mb)} MB`));
      anchor.append(point);
      svg.append(anchor);
      if (best.includes(r)) label(x(r.kv_mb) + 8, y(scaled(r, value)) + 4, x(r.kv_mb) > .8 * width ? "end" : "start", r.recipe);
    }
  });
  const legend = make("p", undefined, "legend");
  tasks.forEach((task, i) => {
    const key = make("span", task);
    key.style.setProperty("--shade", COLOURS[i % COLOURS.length]);
    legend.append(key);
  });
  at("pareto").replaceChildren(svg, legend);
}

// At first the first value that most rows have; full has none of those that compare with it.
const counts = VALUES.map(([key]) => data.rows.filter((r) => has(r, key)).length);
VALUES.forEach(([key, name], i) => { if (counts[i]) option("value", key, name); });
at("value").value = VALUES[counts.findIndex((n) => n > Math.max(...counts) / 2)][0];
at("value").addEventListener("change", () => { pivot(); memory(); });
document.addEventListener("rows", () => { pivot(); memory(); });
addEventListener("resize", memory);
at("summary").textContent = `${new Set(data.rows.map((r) => r.run)).size} runs, ${data.rows.length} rows, ${data.rows.reduce((n, r) => n + r.n, 0)} samples`;
pivot();
memory();
window.__ready = performance.now();
