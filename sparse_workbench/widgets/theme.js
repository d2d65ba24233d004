// Tells the kernel whether the page is dark, and says so again when the theme changes.
function dark() {
  const body = document.body, lab = body.dataset.jpThemeLight;
  if (lab) return lab === "false";                                  // JupyterLab
  if (body.classList.contains("theme-dark")) return true;           // Voilà
  const c = getComputedStyle(body).backgroundColor.match(/[\d.]+/g);
  return c !== null && c.length === 3 && c.reduce((a, b) => a + Number(b), 0) < 384;
}

function initialize({ model }) {
  const tell = () => {
    if (model.get("dark") === dark() && model.get("seen")) return;
    model.set({ dark: dark(), seen: true });
    model.save_changes();
  };
  const watcher = new MutationObserver(tell);
  watcher.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"] });
  tell();
  return () => watcher.disconnect();
}

function render({ el }) { el.style.display = "none"; }

export default { initialize, render };
