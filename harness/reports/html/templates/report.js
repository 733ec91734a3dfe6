// The page's behaviour: the table's filters, the charts, and the drawer with a run's details.
const data = JSON.parse(document.getElementById("data").textContent);
const templates = new Map([...document.querySelectorAll("template[data-run]")].map((t) => [t.dataset.run, t]));
const plots = [];
let shown = [...templates.keys()];
let selected = "";

// A run, from wherever it was clicked: its details, its row, its points and its layers.
const drawer = document.getElementById("drawer");
const pickers = []; // called with the run, each sets its own chart

function open(run) {
  if (!templates.has(run)) return;
  selected = run;
  drawer.replaceChildren(templates.get(run).content.cloneNode(true));
  drawer.hidden = false;
  drawer.scrollTop = 0;
  drawer.querySelector(".close").addEventListener("click", close);
  history.replaceState(null, "", `#run=${encodeURIComponent(run)}`);
  mark();
  pickers.forEach((pick) => pick(run));
}

function close() {
  selected = "";
  drawer.hidden = true;
  history.replaceState(null, "", location.pathname);
  mark();
}

function mark() {
  document.querySelectorAll("#table tbody tr, .best button").forEach((item) => {
    item.classList.toggle("selected", item.dataset.run === selected);
  });
  plots.forEach((view) => view.signal("selected", selected).signal("shown", shown).runAsync());
}

document.addEventListener("click", (event) => {
  const source = event.target.closest("tr[data-run], button[data-run]");
  if (source) open(source.dataset.run);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") close();
  if (event.key === "Enter" && event.target.matches("tr[data-run]")) open(event.target.dataset.run);
});

// Charts. Vega is inlined once; every specification is in the data.
const embed = (element, spec) => vegaEmbed(element, spec, { mode: "vega-lite", actions: false, renderer: "svg" });

document.querySelectorAll("#plots .chart").forEach(async (element, i) => {
  const { view } = await embed(element, data.charts[i]);
  view.addEventListener("click", (_, item) => open(item?.datum?.run));
  plots.push(view);
});

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

async function linearsByBlock({ linears, runs, titles, spec }) {
  const run = document.getElementById("layers-run");
  const figure = document.getElementById("layers-figure");
  const rowsOf = () => {
    const values = runs[run.value].figures[figure.value];
    return linears[runs[run.value].linears]
      .map(([name, block, linear], i) => ({ name, block, linear, value: values[i] }))
      .filter((row) => row.value !== null);
  };
  const figures = () => {
    const before = figure.value;
    const names = Object.keys(runs[run.value].figures);
    fill(figure, names.map((name) => [name, `${name}: ${titles[name]}`]));
    if (names.includes(before)) figure.value = before;
  };
  fill(run, runs.map(({ label }, i) => [i, label]));
  figures();
  const { view } = await embed("#layers-chart", { ...spec, datasets: { layers: rowsOf() } });
  const draw = () => {
    const rows = rowsOf();
    const top = [...rows].sort((a, b) => b.value - a.value).slice(0, 5);
    document.getElementById("layers-top").textContent =
      "Largest: " + top.map((row) => `${row.name} ${row.value.toPrecision(3)}`).join(", ") + ".";
    return view.data("layers", rows).runAsync();
  };
  run.addEventListener("change", () => (figures(), draw()));
  figure.addEventListener("change", draw);
  pickers.push((id) => {
    const place = runs.findIndex((item) => item.run === id);
    if (place >= 0) (run.value = place), figures(), draw();
  });
  draw();
}

async function channelsOfLinear({ runs, spec }) {
  const run = document.getElementById("outliers-run");
  const linear = document.getElementById("outliers-linear");
  const channels = () => runs[run.value].linears[linear.value];
  const rowsOf = ({ rank, channel, before, after }) =>
    rank.flatMap((place, i) => [
      { rank: place, channel: channel[i], stage: "before", absmax: before[i] },
      ...(after ? [{ rank: place, channel: channel[i], stage: "after", absmax: after[i] }] : []),
    ]).filter((row) => row.absmax > 0); // a logarithmic axis has no zero
  const linears = () => {
    const before = linear.value;
    const names = Object.keys(runs[run.value].linears);
    fill(linear, names.map((name) => [name, name]));
    if (names.includes(before)) linear.value = before;
  };
  fill(run, runs.map(({ label }, i) => [i, label]));
  linears();
  const { view } = await embed("#outliers-chart", { ...spec, datasets: { channels: rowsOf(channels()) } });
  const draw = () => {
    const { total, rank, before, after } = channels();
    const fall = after ? `, ${Math.max(...after).toPrecision(3)} after` : "; after it nothing was measured";
    const thinned = total > rank.length ? `; drawn are ${rank.length} of ${total} channels: all of the largest, some of the others` : "";
    document.getElementById("outliers-note").textContent =
      `Largest magnitude: ${Math.max(...before).toPrecision(3)} before smoothing${fall}${thinned}.`;
    return view.data("channels", rowsOf(channels())).runAsync();
  };
  run.addEventListener("change", () => (linears(), draw()));
  linear.addEventListener("change", draw);
  pickers.push((id) => {
    const place = runs.findIndex((item) => item.run === id);
    if (place >= 0) (run.value = place), linears(), draw();
  });
  draw();
}

if (data.layers.runs.length) linearsByBlock(data.layers);
if (data.outliers.runs.length) channelsOfLinear(data.outliers);

// The table. A filter is words or a range of figures; null if it cannot be read.
function range(text) {
  const between = text.match(/^(-?[\d.e+]+)\s*\.\.\s*(-?[\d.e+]+)$/);
  if (between) return (value) => value >= Number(between[1]) && value <= Number(between[2]);
  const [, sign, digits] = text.match(/^(<=|>=|<|>|=)?\s*(-?[\d.]+(?:e[+-]?\d+)?)$/) ?? [];
  const bound = Number(digits);
  if (digits === undefined || Number.isNaN(bound)) return null;
  return {
    "<": (value) => value < bound, ">": (value) => value > bound,
    "<=": (value) => value <= bound, ">=": (value) => value >= bound,
  }[sign] ?? ((value) => value === bound);
}

function words(text) {
  const either = text.toLowerCase().split("|").map((part) => part.split(/\s+/).filter(Boolean));
  return (value) => either.some((all) => all.every((word) => value.toLowerCase().includes(word)));
}

function filter(table, input) {
  const text = input.value.trim();
  const figure = "figure" in input.dataset;
  const test = !text ? () => true : figure ? range(text) : words(text);
  input.classList.toggle("wrong", test === null);
  const passes = (cell) => !text || (cell !== "" && test(figure ? Number(cell) : cell));
  table.column(Number(input.dataset.column)).search.fixed("filter", test && passes).draw();
}

const source = new Blob([document.getElementById("datatables").textContent], { type: "text/javascript" });
const { default: DataTable } = await import(URL.createObjectURL(source));
const table = new DataTable("#table", {
  order: [],
  paging: templates.size > 100,
  pageLength: 100,
  titleRow: 0,
  autoWidth: false,
  layout: { topStart: "info", topEnd: "search", bottomStart: null, bottomEnd: templates.size > 100 ? "paging" : null },
  language: { info: "_TOTAL_ runs", infoEmpty: "no runs", infoFiltered: "of _MAX_", search: "Search", emptyTable: "no runs" },
});
document.querySelectorAll(".filters input").forEach((input) => {
  input.addEventListener("input", () => filter(table, input));
  input.addEventListener("click", (event) => event.stopPropagation());
});
table.on("draw", () => {
  shown = table.rows({ search: "applied" }).nodes().toArray().map((row) => row.dataset.run);
  mark();
});

if (location.hash.startsWith("#run=")) open(decodeURIComponent(location.hash.slice(5)));
document.documentElement.dataset.ready = "true";
