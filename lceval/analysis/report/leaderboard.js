// The first page of a site: methods by budget, and a plot of score against memory, of the selected tasks.
// Value, heading, bounds, whether in percent, whether more is better.
const VALUES = [
  ["score", "score", "ci_lo", "ci_hi", (r) => r.unit === "share", true],
  ["gold_nll_delta", "gold_nll added to full's", "gold_nll_delta_lo", "gold_nll_delta_hi", () => false, false],
  ["gold_nll", "gold_nll", "", "", () => false, false],
  ["recovered", "none to full", "recovered_lo", "recovered_hi", () => true, true],
  ["retention", "retention", "retention_lo", "retention_hi", () => true, true],
];
const amount = (recipe) => (recipe.match(/^[a-z0-9_]+:([0-9.]+|threshold=[^:+]+)/) || [])[1] || "";
const method = (r) => [amount(r.recipe) ? r.recipe.replace(`:${amount(r.recipe)}`, "") : r.recipe,
  ...(r.query_aware ? ["query-aware"] : []), ...(r.peft ? [`+${r.peft.split("/").filter(Boolean).pop()}`] : []),
  ...(r.context && r.context !== "full" ? [r.context] : [])].join(" · ");

function pivot() {
  const [key, , lo, hi, share, more] = VALUES.find(([name]) => name === at("value").value);
  const rows = selectedRows().filter((r) => r[key] !== null && r[key] !== undefined);
  const tasks = [...new Set(rows.map((r) => r.task))], order = (x) => x === "" ? 2 : Number(x) || 0;
  const columns = tasks.flatMap((task) => [...new Set(rows.filter((r) => r.task === task).map((r) => amount(r.recipe)))]
    .sort((a, b) => order(b) - order(a)).map((budget) => [task, budget]));
  const of = (name, [task, budget]) => rows.filter((r) => r.task === task && method(r) === name && amount(r.recipe) === budget);
  const text = (r) => bounded(share(r) ? percent : show, r[key], r[lo], r[hi]);
  const best = columns.map(([task, budget]) => {
    const values = rows.filter((r) => r.task === task && amount(r.recipe) === budget && budget !== "").map((r) => r[key]);
    return values.length > 1 ? (more ? Math.max(...values) : Math.min(...values)) : null;
  });
  const mean = (name) => { const own = rows.filter((r) => method(r) === name).map((r) => r[key]); return own.reduce((a, b) => a + b, 0) / own.length; };
  const names = [...new Set(rows.map(method))].sort((a, b) => (more ? -1 : 1) * (mean(a) - mean(b)));
  const heads = [make("tr"), make("tr")];
  heads[0].append(make("th"), ...tasks.map((task) => {
    const cell = make("th", task);
    cell.colSpan = columns.filter(([other]) => other === task).length;
    cell.scope = "colgroup";
    cell.className = "group";
    return cell;
  }));
  heads[1].append(make("th", "method", "text"), ...columns.map(([, budget]) => make("th", budget || "no budget")));
  at("pivot").replaceChildren(...heads, ...names.map((name) => {
    const line = make("tr");
    line.append(make("td", name, "text"), ...columns.map((column, i) => {
      const cell = make("td");
      of(name, column).forEach((r, n) => {
        const anchor = link(r.page, text(r));
        anchor.title = `${r.run}, ${r.n} samples`;
        if (r[key] === best[i]) anchor.className = "best";
        cell.append(...(n ? [" "] : []), anchor);
      });
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

// Score against the logarithm of the KV memory of a sample.
function memory() {
  const rows = selectedRows().filter((r) => r.kv_mb > 0 && r.score !== null);
  if (!rows.length) { at("pareto").replaceChildren(make("p", "No run has both KV telemetry and a score.")); return; }
  const width = Math.max(300, at("pareto").clientWidth), height = 340, left = 45, right = 12, top = 10, bottom = 40;
  const scaled = (r) => (r.unit === "share" ? 100 : 1) * r.score;
  const logs = rows.map((r) => Math.log10(r.kv_mb)), low = Math.min(...logs) - .05, high = Math.max(...logs) + .05;
  const most = Math.max(...rows.map(scaled), 1e-9) * 1.1;
  const x = (mb) => left + (Math.log10(mb) - low) / (high - low) * (width - left - right);
  const y = (value) => height - bottom - value / most * (height - top - bottom);
  const tasks = [...new Set(rows.map((r) => r.task))];
  const svg = draw("svg", { width, height, role: "img", "aria-label": "score against KV memory" });
  const label = (at_x, at_y, anchor, text) => svg.append(draw("text", { x: at_x, y: at_y, "text-anchor": anchor }, text));
  for (let tick = 0; tick <= 4; tick += 1) {
    const value = most * tick / 4;
    svg.append(draw("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }));
    label(left - 6, y(value) + 4, "end", show(Number(value.toPrecision(2))));
  }
  for (let power = Math.ceil(low); power <= high; power += 1) label(x(10 ** power), height - bottom + 16, "middle", `${10 ** power}`);
  label((left + width - right) / 2, height - bottom + 32, "middle", "KV cache, MB per sample");
  tasks.forEach((task, i) => {
    const shade = COLOURS[i % COLOURS.length], own = rows.filter((r) => r.task === task);
    const best = pareto(own, "kv_mb", 1);
    svg.append(draw("polyline", { points: best.map((r) => `${x(r.kv_mb)},${y(scaled(r))}`).join(" "), fill: "none", stroke: shade, "stroke-dasharray": "2 3" }));
    for (const r of own) {
      const anchor = draw("a", { href: r.page });
      const point = draw("circle", { cx: x(r.kv_mb), cy: y(scaled(r)), r: best.includes(r) ? 6 : 4, stroke: shade, fill: best.includes(r) ? shade : "transparent" });
      point.append(draw("title", {}, `${r.recipe}, ${task}: ${show(scaled(r))} at ${show(r.kv_mb)} MB`));
      anchor.append(point);
      svg.append(anchor);
      if (best.includes(r)) label(x(r.kv_mb) + 8, y(scaled(r)) + 4, x(r.kv_mb) > .8 * width ? "end" : "start", r.recipe);
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

for (const [key, name] of VALUES) if (data.rows.some((r) => r[key] !== null && r[key] !== undefined)) option("value", key, name);
at("value").addEventListener("change", pivot);
document.addEventListener("rows", () => { pivot(); memory(); });
addEventListener("resize", memory);
at("summary").textContent = `${new Set(data.rows.map((r) => r.run)).size} runs, ${data.rows.length} rows, ${data.rows.reduce((n, r) => n + r.n, 0)} samples`;
pivot();
memory();
window.__ready = performance.now();
