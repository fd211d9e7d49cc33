"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const places = Array.from(document.querySelectorAll("[data-chart]"));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // The page's own colours, so that a chart follows light and dark.
  function colours() {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim();
    const line = style.getPropertyValue("--line").trim();
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": ink,
      "xaxis.gridcolor": line, "yaxis.gridcolor": line, "xaxis.linecolor": line, "yaxis.linecolor": line,
    };
  }

  function draw(place) {
    const chart = charts[place.dataset.chart];
    const narrow = place.clientWidth < 480;
    const layout = Object.assign({
      margin: { l: 16, r: 12, t: 8, b: 44 },
      font: { size: narrow ? 11 : 13 },
      legend: { orientation: "h", y: -0.25, x: 0, xanchor: "left", yanchor: "top" },
      hovermode: "closest",
    }, chart.layout);
    Plotly.newPlot(place, chart.data, layout, { responsive: true, displaylogo: false, displayModeBar: false })
      .then(() => Plotly.relayout(place, colours()));
  }

  // Drawn when first seen: a long page opens at once.
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "600px" });
  places.forEach((place) => seen.observe(place));
  dark.addEventListener("change", () => {
    places.filter((place) => place.data).forEach((place) => Plotly.relayout(place, colours()));
  });
})();
