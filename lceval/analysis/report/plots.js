// Plots: each is a function from rows to traces and axes, or to a message about missing data.
const groups = (rows, key) => {
  const byKey = new Map();
  for (const row of rows) byKey.set(key(row), [...(byKey.get(key(row)) || []), row]);
  return [...byKey];
};
const scale = (row) => row.unit === "share" ? 100 : 1;
const axis = (rows) => rows.every((row) => row.unit === "share") ? `${plain([...new Set(rows.map((r) => r.metric))].join(", "))}, %` : "score";
const bars = (rows, mid, lo, hi, by) => rows.some((r) => r[lo] !== null && r[lo] !== undefined) ? {
  type: "data", symmetric: false, thickness: 1, width: 3, color: "#8a94a0",
  array: rows.map((r) => r[hi] === null ? 0 : by(r) * (r[hi] - r[mid])), arrayminus: rows.map((r) => r[lo] === null ? 0 : by(r) * (r[mid] - r[lo])),
} : undefined;
const setting = (context) => context.split(":").slice(0, 2).join(" ");
const recipe = (row) => row.query_aware ? `${row.recipe} · query-aware` : row.recipe;
const label = (row) => plain(row.context && row.context !== "full" ? `${recipe(row)} · ${setting(row.context)}` : recipe(row));
// Bars of the same name would be stacked: the run's name makes them unique.
const unique = (rows, of) => rows.map((row) => rows.filter((other) => of(other) === of(row)).length > 1 ? `${of(row)}<br>${plain(row.run)}` : of(row));
const hover = (row) => plain(`${row.run}, ${row.task}`);

function scatter(rows, x, title, sign, missing) {
  const drawn = rows.filter((r) => r[x] !== null && r[x] !== undefined && r.score !== null);
  if (!drawn.length) return missing;
  const traces = [];
  groups(drawn, (r) => r.task).forEach(([task, own], i) => {
    const colour = COLOURS[i % COLOURS.length], best = pareto(own, x, sign);
    traces.push({ x: best.map((r) => r[x]), y: best.map((r) => scale(r) * r.score), mode: "lines", line: { color: colour, width: 1, dash: "dot" }, hoverinfo: "skip", showlegend: false });
    traces.push({ x: own.map((r) => r[x]), y: own.map((r) => scale(r) * r.score), mode: "markers+text", name: plain(task), text: own.map(label), hovertext: own.map(hover),
      textposition: own.map((_, n) => ["top center", "bottom center", "middle right"][n % 3]), textfont: { size: 10 }, cliponaxis: false,
      marker: { color: colour, size: own.map((r) => best.includes(r) ? 10 : 6) }, error_y: bars(own, "score", "ci_lo", "ci_hi", scale) });
  });
  return { traces, x: title, y: axis(drawn) };
}

const PLOTS = [
  ["memory", "Score against KV memory (dotted: Pareto front)", (rows) => scatter(rows, "kv_mb", "KV cache, MB per sample", 1, "No run has both KV telemetry and a score.")],
  ["speed", "Score against decoding speed (dotted: Pareto front)", (rows) => scatter(rows, "decode_tok_s", "tokens per second", -1, "No run has a decoding speed.")],
  ["retention", "Retention by recipe", (rows) => {
    const drawn = rows.filter((r) => r.retention !== null && r.retention !== undefined && r.recipe !== "full");
    if (!drawn.length) return "No run can be compared with a run of recipe full.";
    return { x: "", y: "retention, %", traces: groups(drawn, (r) => r.task).map(([task, own], i) => ({ type: "bar", name: plain(task), x: unique(own, label), y: own.map((r) => 100 * r.retention),
      hovertext: own.map(hover), marker: { color: COLOURS[i % COLOURS.length] }, error_y: bars(own, "retention", "retention_lo", "retention_hi", () => 100) })) };
  }],
  ["length", "Score by length", (rows) => {
    const drawn = rows.filter((r) => r.length_k && r.score !== null);
    const lines = groups(drawn, (r) => `${r.family} · ${label(r)}`).filter(([, own]) => new Set(own.map((r) => r.length_k)).size > 1);
    if (!lines.length) return "No task was run at two lengths.";
    return { x: "context length, K tokens", y: axis(drawn), log: true, traces: lines.map(([name, own], i) => {
      own.sort((a, b) => a.length_k - b.length_k);
      return { mode: "lines+markers", name: plain(name), x: own.map((r) => r.length_k), y: own.map((r) => scale(r) * r.score), line: { color: COLOURS[i % COLOURS.length] }, error_y: bars(own, "score", "ci_lo", "ci_hi", scale) };
    }) };
  }],
  ["contexts", "Model, adapter and context setting (full cache)", (rows) => {
    const drawn = rows.filter((r) => ["full", "-"].includes(r.recipe) && r.score !== null);
    const configuration = (r) => `${r.peft ? `+${r.peft.split("/").pop()}` : (r.pretrained || r.model).split("/").pop()} · ${setting(r.context || "full")}`;
    if (new Set(drawn.map(configuration)).size < 2) return "All runs have the same model, adapter and context setting.";
    return { x: "", y: axis(drawn), traces: groups(drawn, (r) => r.task).map(([task, own], i) => ({ type: "bar", name: plain(task), x: unique(own, (r) => plain(configuration(r))), y: own.map((r) => scale(r) * r.score),
      hovertext: own.map(hover), marker: { color: COLOURS[i % COLOURS.length] }, error_y: bars(own, "score", "ci_lo", "ci_hi", scale) })) };
  }],
  ["evidence", "Answer quality against gold passages kept", (rows, against) => {
    const bins = new Map();
    rows.forEach((row) => {
      const block = data.blocks[data.rows.indexOf(row)];
      if (row.recipe === "full") return;
      block.gold_kept.forEach((kept, i) => {
        const value = against === "score" ? block.score[i] : block.gold_nll[i];
        if (kept === null || value === null) return;
        const key = `${recipe(row)}\n${Math.min(9, Math.floor(10 * kept))}`;
        bins.set(key, [...(bins.get(key) || []), value]);
      });
    });
    if (!bins.size) return "No evicting run has gold_kept: run with diagnose=gold.";
    const points = [...bins].map(([key, values]) => ({ name: key.split("\n")[0], x: 10 * Number(key.split("\n")[1]) + 5, y: values.reduce((a, b) => a + b, 0) / values.length, n: values.length }));
    return { x: "gold kept, % (bins of 10)", y: `mean ${against}`, traces: groups(points, (p) => p.name).map(([name, own], i) => {
      own.sort((a, b) => a.x - b.x);
      return { mode: "lines+markers", name: plain(name), x: own.map((p) => p.x), y: own.map((p) => p.y), text: own.map((p) => `${p.n} samples`), line: { color: COLOURS[i % COLOURS.length] }, marker: { size: own.map((p) => 5 + Math.min(14, Math.sqrt(p.n))) } };
    }) };
  }],
];

function plots(rows) {
  const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  // All containers first: a plot takes the width of its container.
  if (!at("plots").children.length) at("plots").append(...PLOTS.map(([name, title]) => {
    const figure = make("figure"), box = make("div", undefined, "plot");
    box.id = name;
    figure.append(make("figcaption", title), make("p"), box);
    return figure;
  }));
  for (const [name, , of] of PLOTS) {
    const plot = of(rows, at("against").value), missing = typeof plot === "string", box = at(name);
    box.previousSibling.textContent = missing ? plot : "";
    box.hidden = missing;
    if (missing) { Plotly.purge(box); continue; }
    const grid = { gridcolor: line, zerolinecolor: line, automargin: true };
    Plotly.react(box, plot.traces, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 11 }, margin: { t: 10, r: 20, b: 45, l: 50 }, barmode: "group",
      showlegend: plot.traces.filter((t) => t.showlegend !== false).length > 1, legend: { orientation: "h", y: -0.25 },
      xaxis: { ...grid, title: { text: plot.x }, ...(plot.log ? { type: "log", tickvals: plot.traces.flatMap((t) => t.x) } : {}) }, yaxis: { ...grid, title: { text: plot.y }, rangemode: "tozero" },
    }, { responsive: true, displaylogo: false, toImageButtonOptions: { filename: `lceval-${name}`, scale: 2 },
      modeBarButtonsToAdd: [{ name: "Save as SVG", icon: Plotly.Icons.disk, click: (gd) => Plotly.downloadImage(gd, { format: "svg", filename: `lceval-${name}` }) }] });
  }
}

const draw = () => plots(selectedRows());
document.addEventListener("rows", draw);
at("against").addEventListener("change", draw);
// Tables are painted before the plots are drawn.
setTimeout(() => { draw(); window.__drawn = performance.now(); document.body.dataset.drawn = ""; });
