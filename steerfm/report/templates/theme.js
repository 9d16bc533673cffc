// Light, dark, or what the system says; whoever draws listens to "theme".
window.isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
{
  const button = document.getElementById("theme");
  const names = { light: "Light", dark: "Dark" };
  const changed = () => {
    button.textContent = `Theme: ${names[document.documentElement.dataset.theme] || "as the system"}`;
    document.dispatchEvent(new Event("theme"));
  };
  button.addEventListener("click", () => {
    const next = { undefined: "light", light: "dark", dark: undefined }[document.documentElement.dataset.theme];
    if (next) document.documentElement.dataset.theme = next;
    else delete document.documentElement.dataset.theme;
    changed();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
}

// Switch runs off and on; whoever shows runs listens to "runs", whose detail is the set of places switched off.
{
  const off = new Set();
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".legend button");
    if (!button) return;
    const run = Number(button.dataset.run);
    if (!off.delete(run)) off.add(run);
    for (const other of document.querySelectorAll(`.legend button[data-run="${run}"]`)) {
      other.setAttribute("aria-pressed", String(!off.has(run)));
    }
    document.dispatchEvent(new CustomEvent("runs", { detail: off }));
  });
}
