// The layers of a model as a tree with a filter; every layer has a bar: zeros asked for (mark) and achieved (bar).
const el = (tag, cls, ...inside) => { const e = document.createElement(tag); if (cls) e.className = cls; e.append(...inside); return e; };
const whole = (n) => n.toLocaleString("en-US");

function render({ model, el: root }) {
  root.classList.add("sw-layers");
  const closed = new Set(), items = new Map();
  const filter = el("input", "sw-filter"), count = el("div", "sw-count"), tree = el("div", "sw-tree");
  Object.assign(filter, { type: "search", placeholder: "name, *.mlp.*, re:…, Linear", value: model.get("query") });
  filter.setAttribute("aria-label", "filter layers by name, glob, regular expression or type");
  tree.setAttribute("role", "tree");
  tree.setAttribute("aria-label", "layers");
  tree.tabIndex = 0;
  root.append(filter, count, tree);

  const send = (name, value) => { model.set(name, value); model.save_changes(); };
  filter.addEventListener("input", () => send("query", filter.value));
  filter.addEventListener("keydown", (e) => { e.stopPropagation(); if (e.key === "ArrowDown" || e.key === "Enter") { tree.focus(); e.preventDefault(); } });

  function fill() {
    const rows = model.get("rows"), shown = model.get("shown"), groups = new Map();
    for (const i of shown) { const g = rows[i].group; groups.has(g) ? groups.get(g).push(rows[i]) : groups.set(g, [rows[i]]); }
    items.clear();
    tree.replaceChildren(...[...groups].map(([group, inside]) => inside.length === 1 ? item(inside[0], "") : branch(group, inside)));
    count.textContent = model.get("note");
    count.classList.toggle("sw-wrong", model.get("wrong"));
    marks();
    requestAnimationFrame(choose);            // when it has a place on the page
  }
  function branch(group, inside) {
    const head = el("div", "sw-group", el("span", "sw-twist"), el("span", "", group), el("small", "", `${inside.length}`));
    const body = el("div", "sw-items", ...inside.map((r) => item(r, group)));
    body.setAttribute("role", "group");
    head.setAttribute("role", "treeitem");
    head.dataset.group = group;
    const show = () => { head.setAttribute("aria-expanded", !closed.has(group)); body.hidden = closed.has(group); };
    head.onclick = () => { closed.has(group) ? closed.delete(group) : closed.add(group); show(); };
    head.toggle = show;
    show();
    return el("div", "", head, body);
  }
  function item(row, group) {
    const fillBar = el("i", "sw-got"), mark = el("i", "sw-asked"), text = el("span", "sw-share");
    const name = row.name.startsWith(group + ".") ? row.name.slice(group.length + 1) : row.name;
    const e = el("div", "sw-item", el("span", "sw-name", name.replace(/\.weight$/, "")), el("small", "", row.shape), el("span", "sw-track", fillBar, mark), text);
    e.setAttribute("role", "treeitem");
    e.title = `${row.name}: ${row.kind}, ${row.shape} = ${whole(row.n)} weights`;
    e.dataset.name = row.name;
    e.onclick = () => { send("value", row.name); tree.focus(); };
    items.set(row.name, { e, fillBar, mark, text });
    return e;
  }
  function marks() {
    const bars = model.get("bars");
    for (const [name, { e, fillBar, mark, text }] of items) {
      const [asked, got] = bars[name] ?? [null, null];
      mark.style.display = asked === null ? "none" : "";
      mark.style.left = `${100 * (asked ?? 0)}%`;
      fillBar.style.width = `${100 * (got ?? 0)}%`;
      text.textContent = got === null ? (asked === null ? "" : "…") : `${(100 * got).toFixed(1)} %`;
      e.setAttribute("aria-label", `${name}, ${got === null ? "" : `${(100 * got).toFixed(1)} % zeros of ${(100 * asked).toFixed(1)} % asked`}`);
    }
  }
  function choose() {
    for (const [name, { e }] of items) e.setAttribute("aria-selected", name === model.get("value"));
    const now = items.get(model.get("value"))?.e;
    if (now && !now.parentElement.hidden) {
      const top = now.getBoundingClientRect().top - tree.getBoundingClientRect().top + tree.scrollTop;
      if (top < tree.scrollTop + 24 || top > tree.scrollTop + tree.clientHeight - 30) tree.scrollTop = Math.max(0, top - tree.clientHeight / 2);
    }
  }
  tree.addEventListener("keydown", (e) => {
    const seen = [...tree.querySelectorAll(".sw-item")].filter((i) => i.offsetParent), at = seen.findIndex((i) => i.dataset.name === model.get("value"));
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: seen.length - 1, PageDown: at + 8, PageUp: at - 8 }[e.key];
    const head = items.get(model.get("value"))?.e.closest("div[role=group]")?.previousElementSibling;
    if (to !== undefined && seen.length) send("value", seen[Math.min(seen.length - 1, Math.max(0, to))].dataset.name);
    else if ((e.key === "ArrowLeft" || e.key === "ArrowRight") && head) { e.key === "ArrowLeft" ? closed.add(head.dataset.group) : closed.delete(head.dataset.group); head.toggle(); }
    else return;
    e.preventDefault();
    e.stopPropagation();
  });
  const on = { "change:rows": fill, "change:shown": fill, "change:note": fill, "change:wrong": fill, "change:bars": marks, "change:value": choose };
  for (const [k, f] of Object.entries(on)) model.on(k, f);
  fill();
  return () => { for (const [k, f] of Object.entries(on)) model.off(k, f); };
}

export default { render };
