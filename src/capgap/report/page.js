"use strict";
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const colours = JSON.parse(document.getElementById("colours").textContent);
  const figures = document.querySelectorAll("[data-chart]");
  const seen = new Set();

  // Charts are written for light ground; paper is light and narrow, whatever the screen is.
  const draw = (figure) => {
    const printing = root.classList.contains("printing");
    const isDark = dark.matches && !printing;
    let text = figure.querySelector("script").textContent;
    if (isDark) text = text.replace(/#[0-9a-f]{6}/g, (colour) => colours[colour] ?? colour);
    const spec = JSON.parse(text);
    const chart = figure.querySelector(".chart");
    spec.width = printing ? 620 : chart.clientWidth;
    spec.config.font = getComputedStyle(document.body).fontFamily;
    spec.config.legend.columns = Math.max(1, Math.floor((spec.width - 60) / spec.usermeta.entry));
    if (spec.width < 500) spec.config.axis.labelFontSize = spec.config.axis.titleFontSize = 11;
    const tooltip = { theme: isDark ? "dark" : "light" };
    // expressions are interpreted: the page allows no code that is made from text
    // in an element of its own, whose role and label Vega may change
    const options = { actions: false, ast: true, renderer: "svg", tooltip };
    return vegaEmbed(chart.firstElementChild, spec, options);
  };
  const redraw = () => seen.forEach(draw);

  const observer = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        seen.add(target);
        draw(target);
      }
    },
    { rootMargin: "400px" },
  );
  figures.forEach((figure) => observer.observe(figure));

  dark.addEventListener("change", redraw);
  let width = window.innerWidth;
  let waiting;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (window.innerWidth !== width) redraw();
      width = window.innerWidth;
    }, 150);
  });
  for (const event of ["beforeprint", "afterprint"]) {
    window.addEventListener(event, () => {
      root.classList.toggle("printing", event === "beforeprint");
      figures.forEach((figure) => seen.add(figure));
      redraw();
    });
  }
})();
