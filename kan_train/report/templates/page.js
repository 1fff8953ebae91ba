"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = () => innerWidth < 700;
  const config = { displayModeBar: false, responsive: true, doubleClick: "reset" };

  function paint(style, value) {
    if (typeof value === "string") {
      const named = /^--([a-z0-9-]+)(?:\/([0-9.]+))?$/.exec(value);
      if (!named) return value;
      const colour = style.getPropertyValue("--" + named[1]).trim();
      if (named[2] === undefined) return colour;
      const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
      return `rgba(${parts.join(",")},${named[2]})`;
    }
    if (Array.isArray(value)) return value.length && typeof value[0] === "string" ? value.map((one) => paint(style, one)) : value;
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, paint(style, one)]));
    return value;
  }

  function traces(figure, style) {
    const map = [[0, "--map-low"], [0.5, "--map-middle"], [1, "--map-high"]].map(([at, name]) => [at, paint(style, name)]);
    return figure.data.map((trace) => {
      const { xs, ...rest } = trace;
      const painted = { ...rest, ...Object.fromEntries(["line", "marker", "fillcolor"].filter((name) => name in rest).map((name) => [name, paint(style, rest[name])])) };
      if (xs && figure.view) painted.x = xs[figure.view];
      if (rest.type === "heatmap") painted.colorscale = map;
      return painted;
    });
  }

  function layout(figure, style) {
    const ink = paint(style, "--ink"), soft = paint(style, "--soft"), grid = paint(style, "--grid"), line = paint(style, "--line"), card = paint(style, "--card");
    const axis = (given) => ({
      gridcolor: grid, linecolor: line, zerolinecolor: line, zeroline: false, ...given, title: { ...(given || {}).title, font: { size: narrow() ? 11 : 12, color: soft } },
    });
    const given = figure.layout, view = figure.views[figure.view];
    return {
      autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: narrow() ? "closest" : "x",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow() ? 11 : 12, color: soft }, margin: { l: 52, r: 14, t: 8, b: 40 },
      hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink, size: 12 }, namelength: -1 }, dragmode: narrow() ? false : "zoom", uirevision: figure.view,
      ...given, xaxis: axis({ ...(view || {}), ...(given.xaxis || {}) }), yaxis: axis(given.yaxis),
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: narrow() ? 11 : 12, color: ink }, ...(given.legend || {}) },
    };
  }

  function draw() {
    const style = getComputedStyle(root);
    return Promise.all(figures.map((figure) => {
      const place = document.getElementById("plot-" + figure.id);
      return Plotly.react(place, traces(figure, style), layout(figure, style), config).then(() => {
        // The caption says what it shows: the marks of a picture are noise to who hears them.
        for (const picture of document.querySelectorAll(".plot svg, #js-plotly-tester")) picture.setAttribute("aria-hidden", "true");
        place.dataset.drawn = figure.view || "yes";
      });
    }));
  }

  function press(group, chosen) {
    for (const button of group.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button === chosen));
  }

  const remembered = (() => { try { return localStorage.getItem("kan-theme"); } catch { return null; } })();
  const themes = document.getElementById("themes");
  function theme(name) {
    if (name === "auto") delete root.dataset.theme; else root.dataset.theme = name;
    press(themes, themes.querySelector(`[data-theme-name="${name}"]`));
  }
  theme(["light", "dark"].includes(remembered) ? remembered : "auto");
  themes.addEventListener("click", (event) => {
    const name = event.target.dataset.themeName;
    if (!name) return;
    try { localStorage.setItem("kan-theme", name); } catch { /* a page from a file may have no storage */ }
    theme(name);
    draw();
  });
  dark.addEventListener("change", draw);

  for (const group of document.querySelectorAll("[data-views-of]")) {
    group.addEventListener("click", (event) => {
      const view = event.target.dataset.view;
      if (!view) return;
      figures.find((figure) => figure.id === group.dataset.viewsOf).view = view;
      press(group, event.target);
      draw();
    });
  }
  for (const box of document.querySelectorAll("[data-kind-box]")) {
    box.addEventListener("change", () => {
      for (const row of document.querySelectorAll(`tr[data-kind="${box.dataset.kindBox}"]`)) row.hidden = !box.checked;
    });
  }

  let wasNarrow = narrow();
  addEventListener("resize", () => { if (narrow() !== wasNarrow) { wasNarrow = narrow(); draw(); } });
  addEventListener("beforeprint", () => {
    const before = root.dataset.theme;
    root.dataset.theme = "light";
    draw();
    for (const figure of figures) Plotly.relayout("plot-" + figure.id, { width: 660, autosize: false });
    addEventListener("afterprint", () => {
      if (before) root.dataset.theme = before; else delete root.dataset.theme;
      for (const figure of figures) Plotly.relayout("plot-" + figure.id, { width: null, autosize: true });
      draw();
    }, { once: true });
  });

  draw().then(() => { root.dataset.ready = "yes"; });
})();
