// An executed notebook without a kernel: a page in a frame that may run nothing, and a link that opens the notebook itself.
function server() {
  const at = document.getElementById("jupyter-config-data");
  try { return JSON.parse(at.textContent); } catch { return {}; }
}

// Where the file lies below the server's root; null when it lies elsewhere or there is no JupyterLab.
export function below(paths, home, config) {
  if (!config.serverRoot || !/lab/i.test(config.appName || "")) return null;
  const root = config.serverRoot.replace(/^~(?=\/|$)/, home).replace(/\/+$/, "") + "/";
  const found = paths.find(p => p.startsWith(root));
  return found === undefined ? null : found.slice(root.length);
}

function render({ model, el }) {
  el.classList.add("sw-page");
  const link = document.createElement("div"), frame = document.createElement("iframe");
  frame.setAttribute("sandbox", "");
  frame.title = "executed notebook";
  el.append(link, frame);
  function draw() {
    const paths = model.get("paths"), config = server(), path = below(paths, model.get("home"), config);
    link.replaceChildren();
    if (path !== null) {
      const a = document.createElement("a");
      a.textContent = "open the notebook in JupyterLab";
      a.href = `${config.baseUrl || "/"}lab/tree/${path.split("/").map(encodeURIComponent).join("/")}`;
      a.dataset.commandlinkerCommand = "docmanager:open";           // in this window; the address serves a middle click
      a.dataset.commandlinkerArgs = JSON.stringify({ path });
      link.append(a);
    } else if (paths.length) link.textContent = `the notebook: ${paths[0]}`;
    frame.hidden = !model.get("html");
    if (frame.srcdoc !== model.get("html")) frame.srcdoc = model.get("html");
    frame.style.height = `${model.get("height")}px`;
  }
  const names = ["paths", "html", "height"];
  for (const n of names) model.on(`change:${n}`, draw);
  draw();
  return () => { for (const n of names) model.off(`change:${n}`, draw); };
}

export default { render };
