"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 46rem)");
  const options = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  // A colour is written "@name" in a chart and stands in the style sheet as --name.
  const coloured = (value, styles) => {
    if (typeof value === "string" && value.startsWith("@")) {
      return styles.getPropertyValue("--" + value.slice(1)).trim();
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, styles));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(
        Object.entries(value).map(([key, item]) => [key, coloured(item, styles)]),
      );
    }
    return value;
  };

  // Where the cells of a map are narrow, their numbers stand upright.
  const fitMap = (element, map, layout) => {
    map.showscale = !narrow.matches;
    const room = element.clientWidth - (narrow.matches ? 60 : 150);
    if (room / map.x.length < 54) layout.annotations.forEach((note) => (note.textangle = -90));
  };

  // A long legend gets room of its own, not that of the plot.
  const fitLegend = (element, data) => {
    const names = data.filter((trace) => trace.showlegend !== false).map((trace) => trace.name ?? "");
    const widest = 46 + 6.2 * Math.max(0, ...names.map((name) => name.length));
    const columns = Math.max(1, Math.floor(element.clientWidth / widest));
    element.style.setProperty("--legend", `${19 * Math.ceil(names.length / columns)}px`);
  };

  const draw = (element) => {
    const styles = getComputedStyle(document.documentElement);
    const { data, layout } = coloured(charts[element.dataset.chart], styles);
    fitLegend(element, data);
    layout.font.family = getComputedStyle(document.body).fontFamily;
    // a finger on a chart should scroll the page, not zoom the chart
    layout.dragmode = narrow.matches ? false : "zoom";
    if (narrow.matches) layout.font.size = 11;
    if (data[0].type === "heatmap") fitMap(element, data[0], layout);
    else if (narrow.matches) (layout.annotations ?? []).forEach((note) => (note.font.size = 9));
    const bar = narrow.matches ? false : "hover";
    return Plotly.react(element, data, layout, { ...options, displayModeBar: bar });
  };
  const drawAll = () => document.querySelectorAll(".chart").forEach(draw);

  const resizeAll = () =>
    document.querySelectorAll(".chart").forEach((element) => Plotly.Plots.resize(element));
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  // Paper is light and narrow, whatever the screen is.
  for (const event of ["beforeprint", "afterprint"]) {
    window.addEventListener(event, () => {
      document.documentElement.classList.toggle("printing", event === "beforeprint");
      drawAll();
      resizeAll();
    });
  }
  drawAll();
})();
