// The plots: each is a function of the rows that gives traces and axes, or a line that says what is missing.
const COLOURS = ["#2f7bd9", "#d1495b", "#2a9d8f", "#9b6bdf", "#d98a1f", "#7d8896"];
const groups = (rows, key) => {
  const found = new Map();
  for (const row of rows) found.set(key(row), [...(found.get(key(row)) || []), row]);
  return [...found];
};
const scale = (row) => row.unit === "share" ? 100 : 1;
const axis = (rows) => rows.every((row) => row.unit === "share") ? `${[...new Set(rows.map((r) => r.metric))].join(", ")}, %` : "score";
const bars = (rows, mid, lo, hi, by) => rows.some((r) => r[lo] !== null && r[lo] !== undefined) ? {
  type: "data", symmetric: false, thickness: 1, width: 3, color: "#8a94a0",
  array: rows.map((r) => r[hi] === null ? 0 : by(r) * (r[hi] - r[mid])), arrayminus: rows.map((r) => r[lo] === null ? 0 : by(r) * (r[mid] - r[lo])),
} : undefined;
const shown = (context) => context.split(":").slice(0, 2).join(" ");
const label = (row) => plain(row.context && row.context !== "full" ? `${row.recipe} · ${shown(row.context)}` : row.recipe);
// Bars of one name would be stacked: a second run of the same name brings its own.
const unique = (rows, of) => rows.map((row) => rows.filter((other) => of(other) === of(row)).length > 1 ? `${of(row)}<br>${plain(row.run)}` : of(row));
const about = (row) => plain(`${row.run}, ${row.task}`);

// Points that no other of their task beats on both axes: `sign` is 1 where less of x is better.
const front = (rows, x, sign) => rows.filter((r) => !rows.some((o) =>
  sign * (o[x] - r[x]) <= 0 && o.score >= r.score && (o[x] !== r[x] || o.score !== r.score))).sort((a, b) => a[x] - b[x]);

function scatter(rows, x, title, sign, missing) {
  const drawn = rows.filter((r) => r[x] !== null && r[x] !== undefined && r.score !== null);
  if (!drawn.length) return missing;
  const traces = [];
  groups(drawn, (r) => r.task).forEach(([task, own], i) => {
    const colour = COLOURS[i % COLOURS.length], best = front(own, x, sign);
    traces.push({ x: best.map((r) => r[x]), y: best.map((r) => scale(r) * r.score), mode: "lines", line: { color: colour, width: 1, dash: "dot" }, hoverinfo: "skip", showlegend: false });
    traces.push({ x: own.map((r) => r[x]), y: own.map((r) => scale(r) * r.score), mode: "markers+text", name: plain(task), text: own.map(label), hovertext: own.map(about),
      textposition: own.map((_, n) => ["top center", "bottom center", "middle right"][n % 3]), textfont: { size: 10 }, cliponaxis: false,
      marker: { color: colour, size: own.map((r) => best.includes(r) ? 10 : 6) }, error_y: bars(own, "score", "ci_lo", "ci_hi", scale) });
  });
  return { traces, x: title, y: axis(drawn) };
}

const PLOTS = [
  ["memory", "Score against KV memory (dotted: nothing is better on both)", (rows) => scatter(rows, "kv_mb", "KV, MB a sample", 1, "No run here has KV telemetry and a score.")],
  ["speed", "Score against decoding speed", (rows) => scatter(rows, "decode_tok_s", "tokens a second", -1, "No run here measured its decoding speed.")],
  ["retention", "What is kept of the score under full", (rows) => {
    const drawn = rows.filter((r) => r.retention !== null && r.retention !== undefined && r.recipe !== "full");
    if (!drawn.length) return "No run here has a run under full beside it that answers anything.";
    return { x: "", y: "% of full", traces: groups(drawn, (r) => r.task).map(([task, own], i) => ({ type: "bar", name: plain(task), x: unique(own, label), y: own.map((r) => 100 * r.retention),
      hovertext: own.map(about), marker: { color: COLOURS[i % COLOURS.length] }, error_y: bars(own, "retention", "retention_lo", "retention_hi", () => 100) })) };
  }],
  ["length", "Score by length", (rows) => {
    const drawn = rows.filter((r) => r.length_k && r.score !== null);
    const lines = groups(drawn, (r) => `${r.family} · ${label(r)}`).filter(([, own]) => new Set(own.map((r) => r.length_k)).size > 1);
    if (!lines.length) return "No task here was run at two lengths.";
    return { x: "K tokens", y: axis(drawn), log: true, traces: lines.map(([name, own], i) => {
      own.sort((a, b) => a.length_k - b.length_k);
      return { mode: "lines+markers", name: plain(name), x: own.map((r) => r.length_k), y: own.map((r) => scale(r) * r.score), line: { color: COLOURS[i % COLOURS.length] }, error_y: bars(own, "score", "ci_lo", "ci_hi", scale) };
    }) };
  }],
  ["shown", "Base, adapters and contexts, nothing evicted", (rows) => {
    const drawn = rows.filter((r) => ["full", "-"].includes(r.recipe) && r.score !== null);
    const who = (r) => `${r.peft ? `+${r.peft.split("/").pop()}` : (r.pretrained || r.model).split("/").pop()} · ${shown(r.context || "full")}`;
    if (new Set(drawn.map(who)).size < 2) return "Every run here shows one model the same context.";
    return { x: "", y: axis(drawn), traces: groups(drawn, (r) => r.task).map(([task, own], i) => ({ type: "bar", name: plain(task), x: unique(own, (r) => plain(who(r))), y: own.map((r) => scale(r) * r.score),
      hovertext: own.map(about), marker: { color: COLOURS[i % COLOURS.length] }, error_y: bars(own, "score", "ci_lo", "ci_hi", scale) })) };
  }],
  ["evidence", "The evidence that survived, and the answer", (rows, against) => {
    const bins = new Map();
    rows.forEach((row) => {
      const block = data.blocks[data.rows.indexOf(row)];
      if (row.recipe === "full") return;
      block.gold_kept.forEach((kept, i) => {
        const value = against === "score" ? block.score[i] : block.gold_nll[i];
        if (kept === null || value === null) return;
        const key = `${row.recipe}\n${Math.min(9, Math.floor(10 * kept))}`;
        bins.set(key, [...(bins.get(key) || []), value]);
      });
    });
    if (!bins.size) return "No run here that evicts has gold_kept: run with diagnose=gold.";
    const points = [...bins].map(([key, values]) => ({ recipe: key.split("\n")[0], x: 10 * Number(key.split("\n")[1]) + 5, y: values.reduce((a, b) => a + b, 0) / values.length, n: values.length }));
    return { x: "gold_kept, % (tenths)", y: `mean ${against}`, traces: groups(points, (p) => p.recipe).map(([recipe, own], i) => {
      own.sort((a, b) => a.x - b.x);
      return { mode: "lines+markers", name: plain(recipe), x: own.map((p) => p.x), y: own.map((p) => p.y), text: own.map((p) => `${p.n} samples`), line: { color: COLOURS[i % COLOURS.length] }, marker: { size: own.map((p) => 5 + Math.min(14, Math.sqrt(p.n))) } };
    }) };
  }],
];

function plots(rows) {
  const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  // All places first: a plot takes the width that it finds.
  if (!at("plots").children.length) at("plots").append(...PLOTS.map(([name, title]) => {
    const figure = make("figure"), box = make("div", undefined, "plot");
    box.id = name;
    figure.append(make("figcaption", title), make("p"), box);
    return figure;
  }));
  for (const [name, , of] of PLOTS) {
    const made = of(rows, at("against").value), missing = typeof made === "string", box = at(name);
    box.previousSibling.textContent = missing ? made : "";
    box.hidden = missing;
    if (missing) { Plotly.purge(box); continue; }
    const grid = { gridcolor: line, zerolinecolor: line, automargin: true };
    Plotly.react(box, made.traces, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 11 }, margin: { t: 10, r: 20, b: 45, l: 50 }, barmode: "group",
      showlegend: made.traces.filter((t) => t.showlegend !== false).length > 1, legend: { orientation: "h", y: -0.25 },
      xaxis: { ...grid, title: { text: made.x }, ...(made.log ? { type: "log", tickvals: made.traces.flatMap((t) => t.x) } : {}) }, yaxis: { ...grid, title: { text: made.y }, rangemode: "tozero" },
    }, { responsive: true, displaylogo: false, toImageButtonOptions: { filename: `lceval-${name}`, scale: 2 },
      modeBarButtonsToAdd: [{ name: "Save as SVG", icon: Plotly.Icons.disk, click: (gd) => Plotly.downloadImage(gd, { format: "svg", filename: `lceval-${name}` }) }] });
  }
}
