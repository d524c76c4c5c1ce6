"use strict";
// Draws what /curves answers and what the page's stream adds. Labels are a user's text: they are set as text only.
(() => {
  const place = document.querySelector("[data-curves]");
  if (!place || typeof uPlot === "undefined") return;
  const axis = place.dataset.axis;
  const none = document.querySelector("[data-no-curves]");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hues = () => dark.matches
    ? ["#4fc3d9", "#ffb169", "#b79cff", "#7bd88f", "#ff8fb5", "#e4c441", "#7fb8ff", "#b0bac2"]
    : ["#0b6e86", "#d9730d", "#7048c6", "#2b8a3e", "#c2255c", "#8a6d00", "#1971c2", "#68707a"];
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const duration = (s) => s < 60 ? `${Math.round(s)} s` : s < 3600 ? `${+(s / 60).toFixed(1)} min` : `${+(s / 3600).toFixed(2)} h`;
  const amount = (v) => v >= 1e6 ? `${+(v / 1e6).toFixed(2)} M` : v >= 1e4 ? `${+(v / 1e3).toFixed(1)} k` : `${+(+v).toPrecision(6)}`;
  const figure = (v) => v == null ? "–" : v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(2) : Math.abs(v) >= 1e4 ? amount(v) : `${+v.toPrecision(4)}`;
  const alongX = axis === "time" ? duration : amount;
  const plots = new Map();

  class Chart {
    constructor(element, chart) {
      this.element = element;
      this.series = chart.series.filter((series) => series.points.length || chart.series.every((s) => s.run === 0));
      this.draw();
    }
    draw() {
      this.plot?.destroy();
      this.plot = null;
      this.element.replaceChildren();
      const shown = this.series.filter((series) => series.points.length);
      this.element.closest("figure").hidden = !shown.length;
      if (none) none.hidden = !!place.querySelector("figure:not([hidden])");
      if (!shown.length) return;
      const ink = style("--faint"), line = style("--line"), colours = hues();
      const side = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "11px system-ui, sans-serif" };
      const validation = shown.some((series) => series.run > 0) ? null : 1;
      const options = {
        width: this.element.clientWidth, height: 222, cursor: { y: false, points: { size: 7 } }, padding: [8, 12, 0, 0],
        scales: { x: { time: false } },
        axes: [{ ...side, values: (_, marks) => marks.map(alongX) }, { ...side, size: 56, values: (_, marks) => marks.map(figure) }],
        series: [{ label: axis, value: (_, v) => v == null ? "–" : alongX(v) },
          ...shown.map((series) => {
            const second = series.name === "valid_loss";
            return { label: "", stroke: colours[(second && validation ? validation : series.run) % colours.length], width: 1.8,
              spanGaps: true, dash: second ? [6, 4] : undefined, points: { show: series.points.length < 40, size: 5 },
              value: (_, v) => figure(v) };
          })],
      };
      this.shown = shown;
      const joined = uPlot.join(shown.map(({ points }) => [points.map((p) => p[0]), points.map((p) => p[1])]));
      this.plot = new uPlot(options, joined, this.element);
      // uPlot writes labels as HTML; these are users' words.
      this.element.querySelectorAll(".u-legend .u-series").forEach((row, at) => {
        const label = row.querySelector(".u-label");
        if (label && at > 0) label.textContent = shown[at - 1].label;
      });
    }
    add(name, points) {
      const series = this.series.find((one) => one.name === name);
      if (!series) return;
      const last = series.points.at(-1)?.[0] ?? -Infinity;
      const fresh = points.filter((p) => p[0] > last);
      if (!fresh.length) return;
      series.points.push(...fresh);
      if (!this.plot || !this.shown.includes(series)) { this.draw(); return; }
      this.plot.setData(uPlot.join(this.shown.map(({ points: all }) => [all.map((p) => p[0]), all.map((p) => p[1])])));
    }
    fit() { this.plot?.setSize({ width: this.element.clientWidth, height: 222 }); }
  }

  const waiting = [];
  const add = (points) => {
    for (const chart of plots.values()) for (const [name, added] of Object.entries(points)) chart.add(name, added);
  };
  document.addEventListener("points", (event) => {
    const points = JSON.parse(event.detail.data);
    if (plots.size) add(points); else waiting.push(points);
  });
  fetch(place.dataset.curves, { headers: { Accept: "application/json" } }).then((answer) => answer.json()).then((told) => {
    for (const chart of told.charts) {
      const element = place.querySelector(`[data-chart="${chart.name}"] .plot`);
      if (element) plots.set(chart.name, new Chart(element, chart));
    }
    waiting.splice(0).forEach(add);
    place.dataset.drawn = "yes";
  }).catch(() => { place.dataset.drawn = "failed"; });
  let frame = 0;
  addEventListener("resize", () => { cancelAnimationFrame(frame); frame = requestAnimationFrame(() => plots.forEach((chart) => chart.fit())); });
  dark.addEventListener("change", () => plots.forEach((chart) => chart.draw()));
})();
