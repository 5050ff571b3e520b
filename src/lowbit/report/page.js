"use strict";
const page = (() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const evaluated = runs.map((_, index) => index).filter((index) => runs[index].evaluation);
  const state = { hidden: new Set(), unit: "share", score: "f1", first: evaluated[0], second: evaluated[1] ?? evaluated[0] };

  // The same dashes and markers, by run, as the swatches in tables.py.
  const DASHES = ["solid", "7px,4px", "2px,3px", "9px,3px,2px,3px", "12px,4px"];
  const MARKERS = ["circle", "square", "triangle-up", "diamond", "triangle-down"];
  const COLOURS = 8;
  const CHARTS = {
    learning_rate: { axis: "Learning rate", format: ".3g", factor: 1, unit: "" },
    train_loss: { axis: "Loss", format: ".4f", factor: 1, unit: "" },
    test_loss: { axis: "Loss", format: ".4f", factor: 1, unit: "" },
    test_accuracy: { axis: "Accuracy (%)", format: ".2f", factor: 100, unit: " %" },
  };
  const SCORES = { precision: "Precision", recall: "Recall", f1: "F1" };
  const MANY_POINTS = 60;
  const CELL_TEXT_UP_TO = 12;
  const CELL_NAMES_UP_TO = 24;

  // Plotly reads a little HTML in its labels; a name is to be shown as it is.
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const shorten = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
  const shortLabel = (index) => plain(shorten(runs[index].label, 28));
  const css = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
  const runColour = (index) => css(`--run-${index % COLOURS}`);
  const marker = (index) => MARKERS[index % MARKERS.length];
  const scale = (variable, stops) => css(variable).split(",").map((colour, i) => [stops[i], colour.trim()]);
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
  const longest = Math.max(1, ...runs.flatMap((run) => run.curves.epoch));
  const upTo = (epoch) => [1 - 0.035 * epoch, 1.035 * epoch];
  const allEpochs = upTo(longest);
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = {
    displaylogo: false, responsive: true, doubleClick: "reset",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };

  function axis(title, more = {}) {
    return {
      title: { text: title, font: { size: 12.5, color: css("--soft") }, standoff: 8 },
      tickfont: { size: 12, color: css("--soft") },
      gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, ...more,
    };
  }

  function layout(more) {
    return {
      autosize: true, showlegend: false, uirevision: "keep", dragmode: touch ? false : "zoom",
      paper_bgcolor: css("--raised"), plot_bgcolor: css("--raised"),
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--ink") },
      margin: { l: 56, r: 12, t: 26, b: 44 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 } },
      ...more,
    };
  }

  function show(target, traces, more) {
    Plotly.react(target, traces, layout(more), config);
  }

  // ---- Training curves -------------------------------------------------------------------------------------------

  function curve(name, index) {
    const { axis: title, format, factor, unit } = CHARTS[name];
    const { epoch, [name]: values } = runs[index].curves;
    return {
      x: epoch, y: values.map((value) => (value === null ? null : factor * value)),
      name: title, mode: epoch.length > MANY_POINTS ? "lines" : "lines+markers", connectgaps: false,
      customdata: epoch.map((at) => [shortLabel(index), name === "test_accuracy" ? bestNote(index, at) : ""]),
      hovertemplate: `%{customdata[0]}: <b>%{y:${format}}${unit}</b>%{customdata[1]}<extra></extra>`,
      line: { color: runColour(index), width: 2, dash: DASHES[index % DASHES.length] },
      marker: { color: runColour(index), symbol: marker(index), size: 6.5 },
    };
  }

  /** What the hover box adds at the best epochs. */
  function bestNote(index, epoch) {
    const kinds = ["validation", "test"].filter((kind) => runs[index].best[kind]?.epoch === epoch);
    return kinds.length ? ` (best ${kinds.join(" and ")} epoch)` : "";
  }

  /** The star of the best validation epoch and the open diamond of the best test epoch. */
  function bestMarks(index) {
    const symbols = { validation: ["star", 15, 1], test: ["diamond-open", 16, 2] };
    return Object.entries(symbols).flatMap(([kind, [symbol, size, width]]) => {
      const best = runs[index].best[kind];
      if (best === null || best.test_accuracy === null) return [];
      return [{
        x: [best.epoch], y: [100 * best.test_accuracy], mode: "markers", hoverinfo: "skip",
        marker: { symbol, size, color: runColour(index), line: { width, color: kind === "test" ? runColour(index) : css("--raised") } },
      }];
    });
  }

  /** Pixels to the nearest epoch at most, so that the hover box covers every point of the axis and no run that has ended. */
  const reach = ([from, to]) => Math.max(8, Math.ceil((0.55 * (element("test_loss").clientWidth - 68)) / (to - from)));

  function drawCurves() {
    const visible = runs.map((_, index) => index).filter((index) => !state.hidden.has(index) && runs[index].curves.epoch.length);
    for (const [name, chart] of Object.entries(CHARTS)) {
      const traces = visible.map((index) => curve(name, index));
      if (name === "test_accuracy") traces.push(...visible.flatMap(bestMarks));
      show(element(name), traces, {
        hovermode: "x unified", hoverdistance: reach(element(name).layout?.xaxis.range ?? allEpochs), spikedistance: -1,
        xaxis: axis("Epoch", {
          range: [...allEpochs], unifiedhovertitle: { text: "Epoch %{x}" }, tickformat: "d",
          dtick: longest <= 12 ? 1 : undefined, nticks: 8, showgrid: false, ticks: "outside", tickcolor: css("--line"),
          showspikes: true, spikemode: "across", spikethickness: 1, spikecolor: css("--soft"), spikedash: "dot", spikesnap: "hovered data",
        }),
        yaxis: axis(chart.axis, { exponentformat: "power", rangemode: name === "learning_rate" ? "tozero" : "normal" }),
      });
    }
  }

  /** Zooming one chart zooms the others. */
  function linkZoom(all, more = () => ({})) {
    let leader = null;
    for (const chart of all) {
      chart.on("plotly_relayout", (change) => {
        const range = change["xaxis.range"] ?? [change["xaxis.range[0]"], change["xaxis.range[1]"]];
        if (leader !== null || range[0] === undefined) return;
        leader = chart;
        const updates = all.filter((other) => other !== chart)
          .map((other) => Plotly.relayout(other, { "xaxis.range": [...range], ...more(range) }));
        Promise.all([...updates, Plotly.relayout(chart, more(range))]).finally(() => { leader = null; });
      });
    }
  }

  /** Pointing at one training curve does the same in the others. */
  function linkCurves() {
    const all = Object.keys(CHARTS).map(element);
    linkZoom(all, (range) => ({ hoverdistance: reach(range) }));
    const byHand = (event) => event instanceof Event && event.isTrusted;
    for (const chart of all) {
      const others = all.filter((other) => other !== chart);
      chart.on("plotly_hover", ({ event, points }) => {
        if (!byHand(event)) return;
        for (const other of others) Plotly.Fx.hover(other, { xval: points[0].x }, ["xy"]);
      });
      chart.on("plotly_unhover", ({ event }) => {
        if (byHand(event)) others.forEach((other) => Plotly.Fx.unhover(other));
      });
    }
  }

  // ---- Confusion matrices ----------------------------------------------------------------------------------------

  const shares = ({ matrix, support }) => matrix.map((row, i) => row.map((count) => count / Math.max(1, support[i])));
  const inUnit = (evaluation) => (state.unit === "share" ? shares(evaluation) : evaluation.matrix);

  function heatmap(target, classes, z, text, hover, more) {
    const ticks = {
      tickmode: "array", tickvals: classes.map((_, i) => i), ticktext: classes.map((name) => plain(shorten(name, 14))),
      showgrid: false, ticks: "", constrain: "domain",
    };
    if (classes.length > CELL_NAMES_UP_TO) Object.assign(ticks, { showticklabels: false });
    const cell = target.clientWidth / (classes.length + 4);
    show(target, [{
      type: "heatmap", z, customdata: hover, xgap: 1, ygap: 1, showscale: false, text,
      texttemplate: classes.length <= CELL_TEXT_UP_TO ? "%{text}" : undefined, textfont: { size: Math.max(8, Math.min(13, cell / 2.7)) },
      hovertemplate: "%{customdata}<extra></extra>", ...more,
    }], {
      margin: { l: 8, r: 8, t: 26, b: 8 },
      xaxis: axis("Predicted", { ...ticks, tickangle: -45 }),
      yaxis: axis("True", { ...ticks, autorange: "reversed", scaleanchor: "x" }),
    });
  }

  function drawMatrix(target, index) {
    const { classes, matrix, support } = runs[index].evaluation;
    const share = shares(runs[index].evaluation);
    const top = state.unit === "share" ? 1 : Math.max(1, ...support);
    const text = matrix.map((row, i) => row.map((n, j) => (n === 0 ? "" : state.unit === "share" ? (100 * share[i][j]).toFixed(0) : n)));
    const hover = matrix.map((row, i) => row.map((n, j) =>
      `True <b>${plain(classes[i])}</b>, predicted <b>${plain(classes[j])}</b><br>${n} of ${support[i]} images, ${percent(share[i][j])}`));
    heatmap(target, classes, inUnit(runs[index].evaluation), text, hover, {
      zmin: 0, zmax: top, colorscale: scale("--sequence", [0, 0.01, 0.1, 0.4, 1]),
    });
  }

  function drawMatrices() {
    for (const index of evaluated) drawMatrix(element(`matrix-${index}`), index);
  }

  function makeMatrices() {
    for (const index of evaluated) {
      const figure = document.createElement("figure");
      const caption = document.createElement("figcaption");
      caption.textContent = runs[index].label;
      const target = document.createElement("div");
      target.className = "square";
      target.id = `matrix-${index}`;
      figure.append(caption, target);
      element("matrices").append(figure);
    }
  }

  // ---- From one run to another -----------------------------------------------------------------------------------

  const sameClasses = (a, b) => a.classes.length === b.classes.length && a.classes.every((name, i) => name === b.classes[i]);

  function message(target, text) {
    Plotly.purge(target);
    const paragraph = document.createElement("p");
    paragraph.className = "empty";
    paragraph.textContent = text;
    target.replaceChildren(paragraph);
  }

  function drawDifference(first, second) {
    const [a, b] = [runs[first].evaluation, runs[second].evaluation];
    const [before, after, sharesA, sharesB] = [inUnit(a), inUnit(b), shares(a), shares(b)];
    const z = after.map((row, i) => row.map((value, j) => value - before[i][j]));
    const top = Math.max(1e-9, ...z.flat().map(Math.abs));
    const sign = (value, digits) => (value > 0 ? "+" : value < 0 ? "−" : "±") + Math.abs(value).toFixed(digits);
    const factor = state.unit === "share" ? 100 : 1;
    const text = z.map((row) => row.map((value) => (Math.round(factor * value) === 0 ? "" : sign(factor * value, 0))));
    const hover = z.map((row, i) => row.map((_, j) =>
      `True <b>${plain(a.classes[i])}</b>, predicted <b>${plain(a.classes[j])}</b><br>` +
      `${a.matrix[i][j]} → ${b.matrix[i][j]} images, ${percent(sharesA[i][j])} → ${percent(sharesB[i][j])}` +
      ` (${sign(100 * (sharesB[i][j] - sharesA[i][j]), 1)} points)`));
    heatmap(element("difference"), a.classes, z, text, hover, {
      zmin: -top, zmax: top, colorscale: scale("--divergence", [0, 0.25, 0.5, 0.75, 1]),
    });
  }

  /** Class indices, those whose score falls most from `first` to `second` on top; for one run the lowest score. */
  function order(first, second) {
    const [a, b] = [runs[first].evaluation.scores[state.score], runs[second].evaluation.scores[state.score]];
    const key = first === second ? a : a.map((value, i) => b[i] - value);
    return key.map((_, i) => i).sort((i, j) => key[i] - key[j]);
  }

  function drawScores(first, second, classes, rows) {
    const chosen = first === second ? [first] : [first, second];
    const value = (index, row) => 100 * runs[index].evaluation.scores[state.score][row];
    const position = rows.map((_, i) => i);
    const links = {
      mode: "lines", hoverinfo: "skip", line: { color: css("--soft"), width: 1.5 },
      x: rows.flatMap((row) => [...chosen.map((index) => value(index, row)), null]),
      y: position.flatMap((i) => [...chosen.map(() => i), null]),
    };
    const points = chosen.map((index) => ({
      mode: "markers", x: rows.map((row) => value(index, row)), y: position,
      customdata: rows.map((row) => [plain(classes[row]), shortLabel(index)]),
      hovertemplate: "<b>%{customdata[0]}</b>, %{customdata[1]}: %{x:.1f} %<extra></extra>",
      marker: { color: runColour(index), symbol: marker(index), size: 11, line: { width: 1.5, color: css("--raised") } },
    }));
    const target = element("scores");
    target.style.height = `${Math.max(element("difference").clientHeight, 96 + 28 * rows.length)}px`;
    show(target, [links, ...points], {
      hovermode: "closest",
      xaxis: axis(`${SCORES[state.score]} (%)`, { ticks: "outside", tickcolor: css("--line"), nticks: 6 }),
      yaxis: axis("", {
        tickmode: "array", tickvals: position, ticktext: rows.map((row) => plain(shorten(classes[row], 18))),
        range: [rows.length - 0.4, -0.6], gridcolor: css("--grid"),
      }),
    });
  }

  function cell(tag, text, className = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    made.className = className;
    return made;
  }

  function drawScoresTable(first, second, classes, rows) {
    const [a, b] = [runs[first].evaluation, runs[second].evaluation];
    const pair = first !== second;
    const table = cell("table", "", "numbers");
    const head = table.createTHead().insertRow();
    head.append(cell("th", "Class"), cell("th", "Images"), ...Object.values(SCORES).map((title) => cell("th", pair ? `${title} (%), change` : `${title} (%)`)));
    const body = table.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      line.append(cell("th", classes[row]), cell("td", a.support[row] === b.support[row] ? a.support[row] : `${a.support[row]} / ${b.support[row]}`));
      for (const score of Object.keys(SCORES)) {
        const [before, after] = [100 * a.scores[score][row], 100 * b.scores[score][row]];
        const entry = cell("td", pair ? `${before.toFixed(1)} → ${after.toFixed(1)}` : before.toFixed(1));
        const change = after - before;
        if (pair) entry.append(cell("span", (change >= 0 ? "+" : "−") + Math.abs(change).toFixed(1), change < -0.05 ? "change loss" : change > 0.05 ? "change gain" : "change"));
        line.append(entry);
      }
    }
    element("scores-table").replaceChildren(table);
  }

  function pairLegend(indices) {
    const legend = cell("small", "", "runs");
    for (const index of indices) {
      const run = cell("span", "", "run");
      run.append(...[...element("legend").children[index].childNodes].map((node) => node.cloneNode(true)));
      legend.append(run);
    }
    return legend;
  }

  function drawPair() {
    const { first, second } = state;
    const [a, b] = [runs[first].evaluation, runs[second].evaluation];
    const names = [runs[first].label, runs[second].label];
    element("scores-title").textContent = SCORES[state.score];
    element("difference-title").textContent = "Difference of the confusion matrices";
    if (!sameClasses(a, b)) {
      message(element("difference"), "These two runs have different classes: there is no difference to show.");
      message(element("scores"), "Choose two runs with the same classes.");
      element("scores").style.height = "auto";
      element("scores-table").replaceChildren();
      return;
    }
    const rows = order(first, second);
    if (first === second) message(element("difference"), "Choose two different runs to see their difference.");
    else {
      element("difference").querySelector(".empty")?.remove();
      element("difference-title").append(cell("small", `Orange: ${names[1]} puts more images there than ${names[0]}; blue: fewer.`));
      drawDifference(first, second);
    }
    element("scores").querySelector(".empty")?.remove();
    element("scores-title").append(pairLegend(first === second ? [first] : [first, second]));
    drawScores(first, second, a.classes, rows);
    drawScoresTable(first, second, a.classes, rows);
  }

  // ---- Controls --------------------------------------------------------------------------------------------------

  function draw() {
    drawCurves();
    if (evaluated.length) {
      drawMatrices();
      drawPair();
    }
  }

  /** A row of buttons of which one is pressed, kept in `state[key]`. */
  function choice(key, redraw) {
    const buttons = [...document.querySelectorAll(`button[data-${key}]`)];
    for (const button of buttons) {
      button.addEventListener("click", () => {
        state[key] = button.dataset[key];
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        redraw();
      });
    }
  }

  function select(key) {
    const menu = element(key);
    menu.append(...evaluated.map((index) => new Option(runs[index].label, index)));
    menu.value = state[key];
    menu.addEventListener("change", () => {
      state[key] = Number(menu.value);
      drawPair();
    });
  }

  for (const button of element("legend").children) {
    button.addEventListener("click", () => {
      const index = Number(button.dataset.run);
      if (!state.hidden.delete(index)) state.hidden.add(index);
      button.setAttribute("aria-pressed", String(!state.hidden.has(index)));
      drawCurves();
    });
  }

  if (evaluated.length) {
    makeMatrices();
    select("first");
    select("second");
    choice("unit", () => { drawMatrices(); drawPair(); });
    choice("score", drawPair);
  } else {
    for (const id of ["confusion", "classes"]) {
      const section = element(id).parentElement;
      section.replaceChildren(element(id), cell("p", "No run has been evaluated yet.", "empty"));
    }
  }
  if (evaluated.length === 1) element("pair").querySelectorAll("label").forEach((label) => { label.hidden = true; });
  draw();
  linkCurves();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  return { runs, element, state, DASHES, MARKERS, MANY_POINTS, plain, shorten, css, runColour, marker, upTo, axis, show, linkZoom, cell, choice };
})();
