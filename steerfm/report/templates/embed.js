// Vega draws without eval (ast), and with the page's own style for tooltips.
window.drawChart = (element, specification, config) =>
  vegaEmbed(element, specification, {
    config, actions: false, ast: true, renderer: "svg", defaultStyle: false, tooltip: { disableDefaultStyle: true },
  });
