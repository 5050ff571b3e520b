(() => {
  const { runs, element, plain, css, axis, show, shorten, runColour, marker } = page;
  const CHARTS = {
    packed_bytes: { axis: "Packed file (bytes)", value: (x) => `${x.toLocaleString("en")} bytes` },
    milliseconds: { axis: "Time of one image (ms)", value: (x) => `${x.toPrecision(3)} ms` },
  };
  const drawn = Object.keys(CHARTS).filter(element);

  /** Ticks at 1, 2 and 5 times powers of ten: few, and never only one. */
  function ticks(low, high) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) all.push(...[1, 2, 5].map((n) => n * 10 ** power));
    return all.filter((value) => value >= low && value <= high);
  }

  function draw(name) {
    const points = runs.flatMap((run, index) => (run.costs?.[name] ? [{ index, ...run.costs[name], accuracy: 100 * run.costs.accuracy }] : []));
    const front = points.filter((point) => point.front).sort((a, b) => a.cost - b.cost || a.accuracy - b.accuracy);
    const costs = points.map((point) => point.cost);
    const [low, high] = [Math.min(...costs) / 1.25, Math.max(...costs) * 1.25];
    const values = ticks(low, high);
    const label = ({ index }) => plain(runs[index].label);
    // A label stands below the line and right of its point, save where the chart ends.
    const middle = Math.sqrt(low * high);
    const marks = (chosen, more) => ({
      mode: "markers", x: chosen.map((point) => point.cost), y: chosen.map((point) => point.accuracy),
      customdata: chosen.map((point) => [label(point), CHARTS[name].value(point.cost), point.front ? "<br>on the front" : ""]),
      hovertemplate: "<b>%{customdata[0]}</b><br>%{y:.2f} %, %{customdata[1]}%{customdata[2]}<extra></extra>",
      marker: {
        color: chosen.map(({ index }) => runColour(index)), symbol: chosen.map(({ index }) => marker(index)),
        size: 11, line: { width: 1.5, color: css("--raised") }, ...more.marker,
      },
      ...more.trace,
    });
    show(element(name), [
      {
        mode: "lines", x: front.map((point) => point.cost), y: front.map((point) => point.accuracy), hoverinfo: "skip",
        line: { shape: "hv", color: css("--soft"), width: 1.5, dash: "4px,3px" },
      },
      marks(points.filter((point) => !point.front), { marker: { opacity: 0.45 } }),
      marks(front, {
        trace: {
          mode: "markers+text", text: front.map(({ index }) => plain(shorten(runs[index].label, 22))), cliponaxis: false,
          textposition: front.map(({ cost }) => (cost > middle ? "top left" : "bottom right")), textfont: { size: 11.5, color: css("--ink") },
        },
      }),
    ], {
      hovermode: "closest",
      xaxis: axis(CHARTS[name].axis, {
        type: "log", range: [Math.log10(low), Math.log10(high)], ticks: "outside", tickcolor: css("--line"), showgrid: false,
        tickmode: "array", tickvals: values, ticktext: values.map((value) => (value >= 1000 ? `${value / 1000}k`.replace("000k", "M") : String(Number(value.toPrecision(1))))),
      }),
      yaxis: axis("Accuracy (%)"),
    });
  }

  const drawAll = () => drawn.forEach(draw);
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
