// The table of runs: one page of rows, sorted and filtered by the kernel. What a person does goes back as traits:
// sort, page, picked (curves), current (the run that is looked at).
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function render({ model, el }) {
  el.classList.add("sw-runs");
  const head = make("thead"), body = make("tbody");
  const table = make("table", { role: "grid", "aria-label": "runs", "aria-multiselectable": "true" }, head, body);
  const pager = make("div", { class: "sw-pager", role: "group", "aria-label": "pages" });
  el.append(make("div", { class: "sw-runs-scroll" }, table), pager);
  el.setAttribute("data-lm-suppress-shortcuts", "true");             // the notebook's own keys rest while the table has them
  const stop = new AbortController(), own = { signal: stop.signal };
  let focus = null, take = false;                                    // row that has the keyboard; whether it takes it after the next drawing
  const say = (name, value) => { model.set(name, value); model.save_changes(); };
  const rows = () => [...body.children], keys = () => rows().map(r => r.dataset.key);

  function pick(key) {
    const picked = model.get("picked");
    say("picked", picked.includes(key) ? picked.filter(k => k !== key) : [...picked, key]);
  }
  function move(to) {
    const all = rows(), row = all[Math.max(0, Math.min(all.length - 1, to))];
    if (!row) return;
    focus = row.dataset.key;
    for (const r of all) r.tabIndex = r === row ? 0 : -1;
    row.focus();
  }
  function turn(by) {
    const { page, pages } = model.get("view"), to = Math.max(0, Math.min(pages - 1, page + by));
    if (to !== page) say("page", to);
  }

  function header(c, sort) {
    if (c.key === "spark" || c.key === "pick") return make("th", { scope: "col", class: `sw-${c.key}` }, c.label);
    const mine = sort[0] === c.key, down = mine && sort[1];
    const button = make("button", { type: "button", title: `sort by ${c.label}` }, c.label, make("span", { "aria-hidden": "true" }, mine ? (down ? " ▼" : " ▲") : ""));
    button.addEventListener("click", () => say("sort", [c.key, mine ? !down : c.number]), own);
    return make("th", { scope: "col", class: c.number ? "sw-number" : null, "aria-sort": mine ? (down ? "descending" : "ascending") : "none", "data-column": c.key }, button);
  }

  function cell(c, value, row, chosen) {
    if (c.key === "pick") {
      const box = make("input", { type: "checkbox", tabindex: "-1", "aria-label": `curves of ${row.title}` });
      box.checked = chosen;
      if (row.color) box.style.accentColor = row.color;
      box.addEventListener("change", () => pick(row.key), own);
      return make("td", { class: "sw-pick" }, box);
    }
    const td = make("td", { class: [c.number ? "sw-number" : "", c.key === "run" ? "sw-name" : "", c.key === "spark" ? "sw-spark" : ""].join(" ").trim() || null, title: value.title || null });
    if (c.key === "spark") td.innerHTML = value.text;                // SVG of numbers, made by the kernel
    else if (c.key === "status") td.append(make("span", { class: `sw-mark sw-${row.status}` }, value.text));
    else td.textContent = value.text;
    return td;
  }

  function draw() {
    const view = model.get("view"), picked = model.get("picked"), current = model.get("current");
    const had = take || body.contains(document.activeElement);
    head.replaceChildren(make("tr", {}, ...view.columns.map(c => header(c, model.get("sort")))));
    body.replaceChildren(...view.rows.map(row => {
      const chosen = picked.includes(row.key);
      const tr = make("tr", { "data-key": row.key, "data-status": row.status, "aria-selected": String(chosen), "aria-current": row.key === current ? "true" : null },
        ...view.columns.map((c, i) => cell(c, row.cells[i], row, chosen)));
      tr.addEventListener("click", e => { if (e.target.tagName !== "INPUT") { focus = row.key; say("current", row.key); } }, own);
      return tr;
    }));
    if (!keys().includes(focus)) focus = keys()[0] ?? null;
    for (const r of rows()) r.tabIndex = r.dataset.key === focus ? 0 : -1;
    if (had) rows().find(r => r.dataset.key === focus)?.focus();
    take = false;
    const button = (label, title, by, off) => {
      const b = make("button", { type: "button", title, "aria-label": title }, label);
      b.disabled = off;
      b.addEventListener("click", () => turn(by), own);
      return b;
    };
    pager.replaceChildren(make("span", { class: "sw-count", role: "status" }, view.said), button("‹", "previous page", -1, view.page === 0),
      make("span", {}, `page ${view.page + 1} of ${view.pages}`), button("›", "next page", 1, view.page + 1 >= view.pages));
    if (!view.rows.length) body.replaceChildren(make("tr", { class: "sw-none" }, make("td", { colspan: String(view.columns.length) }, view.empty)));
  }

  body.addEventListener("keydown", e => {
    const all = rows(), at = all.findIndex(r => r.contains(e.target)), key = all[at]?.dataset.key;
    if (!key || e.ctrlKey || e.metaKey || e.altKey) return;
    const act = { ArrowDown: () => move(at + 1), ArrowUp: () => move(at - 1), Home: () => move(0), End: () => move(all.length - 1),
      PageDown: () => { take = true; turn(1); }, PageUp: () => { take = true; turn(-1); },
      " ": () => pick(key), Enter: () => say("current", key) }[e.key];
    if (!act) return;
    e.preventDefault();
    e.stopPropagation();
    act();
  }, own);
  for (const name of ["view", "picked", "current"]) model.on(`change:${name}`, draw);
  draw();
  return () => {
    stop.abort();
    for (const name of ["view", "picked", "current"]) model.off(`change:${name}`, draw);
  };
}

export default { render };
