// Draw the charts, again when the theme changes; a run that is switched off leaves them.
{
  const { charts, light, dark } = JSON.parse(document.getElementById("charts-data").textContent);
  const labels = [...document.querySelectorAll("#run-labels li")].map((item) => item.textContent);
  let views = [];
  let hidden = [];
  const hide = (view) => {
    if (view.getState().signals.hidden !== undefined) view.signal("hidden", hidden).runAsync();
  };
  const draw = async () => {
    const config = window.isDark() ? dark : light;
    for (const view of views.splice(0)) view.finalize();
    for (const [name, specification] of Object.entries(charts)) {
      const { view } = await window.drawChart(document.getElementById(name), { ...specification, config }, config);
      views.push(view);
      hide(view);
    }
    document.documentElement.dataset.drawn = String(views.length);
  };
  if (Object.keys(charts).length) {
    addEventListener("load", draw);
    document.addEventListener("theme", draw);
    document.addEventListener("runs", (event) => {
      hidden = [...event.detail].map((run) => labels[run]);
      views.forEach(hide);
    });
  }
}
