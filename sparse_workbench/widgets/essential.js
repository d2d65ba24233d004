// A chart of quality against sparsity: look with the pointer, walk with a click or the arrow keys.
const NS = "http://www.w3.org/2000/svg";

function add(parent, tag, attrs = {}, text) {
  const e = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attrs)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return parent.appendChild(e);
}

const percent = (v) => `${+(100 * v).toFixed(1)} %`;
const number = (v) => Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(3));
const clamp = (v, lo, hi) => Math.min(hi, Math.max(lo, v));

function ticks(lo, hi, log) {
  if (log) {
    const out = [], steps = hi / lo > 200 ? [1] : hi / lo > 20 ? [1, 3] : [1, 2, 5];
    for (let e = Math.floor(Math.log10(lo)); e <= Math.ceil(Math.log10(hi)); e++)
      for (const m of steps) if (m * 10 ** e >= lo && m * 10 ** e <= hi) out.push(m * 10 ** e);
    return out;
  }
  const rough = (hi - lo) / 5, mag = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * mag).find((s) => s >= rough), out = [];
  for (let v = Math.ceil(lo / step) * step; v <= hi + 1e-9; v += step) out.push(+v.toPrecision(12));
  return out;
}

function between(points, x) {                                         // value at x on straight lines between points
  if (!points.length || x < points[0][0] - 1e-9 || x > points.at(-1)[0] + 1e-9) return null;
  const i = Math.max(1, points.findIndex((p) => p[0] >= x - 1e-9));
  if (points.length === 1) return points[0][1];
  const [a, b] = [points[i - 1], points[i]];
  return b[0] === a[0] ? b[1] : a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]);
}

function scales(d, width, height) {
  const m = { left: 62, right: 16, top: 16, bottom: 44 }, f = d.log ? Math.log10 : (v) => v;
  const w = width - m.left - m.right, h = height - m.top - m.bottom, [lo, hi] = [f(d.y0), f(d.y1)];
  return { m, w, h, x: (v) => m.left + v * w, y: (v) => m.top + h - (f(Math.max(v, 1e-12)) - lo) / (hi - lo) * h, back: (px) => clamp((px - m.left) / w, 0, 1) };
}

function axes(svg, d, s, width, height) {
  const g = add(svg, "g", { class: "es-axes" });
  for (const v of ticks(d.y0, d.y1, d.log)) {
    add(g, "line", { x1: s.m.left, x2: s.m.left + s.w, y1: s.y(v), y2: s.y(v), class: "es-grid" });
    add(g, "text", { x: s.m.left - 8, y: s.y(v) + 4, "text-anchor": "end" }, number(v));
  }
  for (let v = 0; v <= 10; v += width < 460 ? 2 : 1) add(g, "text", { x: s.x(v / 10), y: height - s.m.bottom + 18, "text-anchor": "middle" }, `${v * 10}`);
  add(g, "line", { x1: s.m.left, x2: s.m.left + s.w, y1: s.m.top + s.h, y2: s.m.top + s.h, class: "es-base" });
  add(g, "text", { x: s.m.left + s.w / 2, y: height - 6, "text-anchor": "middle", class: "es-label" }, "sparsity (% of the weights that are zero)");
  add(g, "text", { transform: `translate(14 ${s.m.top + s.h / 2}) rotate(-90)`, "text-anchor": "middle", class: "es-label" }, d.ylabel);
}

const path = (s, pts, i) => pts.map((p, k) => `${k ? "L" : "M"}${s.x(p[0]).toFixed(1)} ${s.y(p[i]).toFixed(1)}`).join("");

function curve(svg, c, s, focus) {
  const g = add(svg, "g", { class: `es-curve es-c${c.color} ${focus ? "es-focus" : ""}`, "data-line": c.id }), p = c.points;
  if (p.length > 1) add(g, "path", { d: path(s, p, 2) + path(s, [...p].reverse(), 3).replace("M", "L") + "Z", class: "es-band" });
  add(g, "path", { d: path(s, p, 1), class: "es-line", "stroke-dasharray": c.dash });
  for (const q of p) add(g, "circle", { cx: s.x(q[0]), cy: s.y(q[1]), r: focus ? 3.4 : 2.6, class: "es-point", "data-x": q[0], "data-y": q[1] });
  for (const [k, x] of c.missing.entries()) add(g, "circle", { cx: s.x(x), cy: s.m.top + s.h - 5 - 7 * c.row, r: 2.2, class: k || !c.busy ? "es-missing" : "es-missing es-busy" });
  if (c.knee) {
    const [v, lo, hi, y] = c.knee, py = s.y(y);
    add(g, "path", { d: `M${s.x(lo)} ${py - 5}V${py + 5}M${s.x(hi)} ${py - 5}V${py + 5}M${s.x(lo)} ${py}H${s.x(hi)}`, class: "es-whisker" });
    add(g, "path", { d: `M${s.x(v)} ${py - 7}l7 7l-7 7l-7 -7Z`, class: "es-knee" });
    if (focus) add(g, "text", { x: s.x(v), y: py - 13, "text-anchor": "middle", class: "es-knee-label" }, `knee ${percent(v)}`);
  }
}

function marker(svg, d, s, at, id) {
  const c = d.lines.find((l) => l.id === id), g = add(svg, "g", { class: `es-marker es-c${c ? c.color : 0}` }), px = s.x(at);
  add(g, "line", { x1: px, x2: px, y1: s.m.top, y2: s.m.top + s.h, class: "es-at" });
  const v = c ? between(c.points, at) : null;
  if (v !== null) add(g, "circle", { cx: px, cy: clamp(s.y(v), s.m.top, s.m.top + s.h), r: 7, class: "es-ring" });
  return c && v !== null ? `${c.name} at ${percent(at)} zeros: ${number(v)} ${d.unit}` : `${percent(at)} zeros`;
}

function near(d, s, px, py) {                                          // the measured point under the pointer
  let best = null;
  for (const c of d.lines) for (const p of c.points) {
    const r = Math.hypot(s.x(p[0]) - px, s.y(p[1]) - py);
    if (r < 16 && (!best || r < best.r)) best = { r, c, p };
  }
  return best;
}

function look(layer, d, s, px, py) {                                   // what the pointer is at, as a small box
  layer.replaceChildren();
  const hit = near(d, s, px, py);
  if (!hit) return;
  const { c, p } = hit, lines = [c.name, `${percent(p[0])} zeros`, `${number(p[1])} ${d.unit}`, `95 %: ${number(p[2])} to ${number(p[3])}`];
  const w = 8 + 6.6 * Math.max(...lines.map((t) => t.length)), x = clamp(s.x(p[0]) + 12, s.m.left, s.m.left + s.w - w), y = clamp(s.y(p[1]) - 76, s.m.top, s.m.top + s.h - 74);
  add(layer, "circle", { cx: s.x(p[0]), cy: s.y(p[1]), r: 6, class: `es-ring es-c${c.color}` });
  add(layer, "rect", { x, y, width: w, height: 68, rx: 5, class: "es-box" });
  lines.forEach((t, i) => add(layer, "text", { x: x + 8, y: y + 17 + 15 * i, class: i ? "" : "es-strong" }, t));
}

function picked(d, s, px, py, id) {                                    // where a click leads: a point, else this sparsity
  const hit = near(d, s, px, py);
  if (hit) return [hit.p[0], hit.c.id];
  const x = Math.round(100 * s.back(px)) / 100;
  const open = d.lines.map((c) => [between(c.points, x), c.id]).filter(([v]) => v !== null).map(([v, i]) => [Math.abs(s.y(v) - py), i]).sort((a, b) => a[0] - b[0]);
  return [clamp(x, 0, d.last), open.length && open[0][0] < 24 ? open[0][1] : id];
}

function render({ model, el }) {
  el.classList.add("es-chart");
  const svg = add(el, "svg", { role: "slider", tabindex: "0", "aria-label": "sparsity; arrow keys walk along the curve, up and down change the curve", "aria-valuemin": 0 });
  const clip = `es-clip-${Math.random().toString(36).slice(2)}`;       // two views of one chart have two clips
  let s, width = 0;
  const draw = () => {
    const d = model.get("data"), at = model.get("at"), id = model.get("line"), height = 420;
    width = el.clientWidth;
    if (!width || !d.lines) return;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    s = scales(d, width, height);
    axes(svg, d, s, width, height);
    add(add(svg, "clipPath", { id: clip }), "rect", { x: s.m.left - 4, y: s.m.top - 4, width: s.w + 8, height: s.h + 8 });
    const body = add(svg, "g", { "clip-path": `url(#${clip})` });
    for (const c of d.lines.filter((l) => l.id !== id)) curve(body, c, s, false);
    for (const c of d.lines.filter((l) => l.id === id)) curve(body, c, s, true);
    svg.setAttribute("aria-valuetext", marker(body, d, s, at, id));
    svg.setAttribute("aria-valuenow", at); svg.setAttribute("aria-valuemax", d.last);
    add(svg, "g", { class: "es-look" });
  };
  const place = (e) => { const r = svg.getBoundingClientRect(); return [e.clientX - r.left, e.clientY - r.top]; };
  const go = (at, line) => { model.set({ at: clamp(+at.toFixed(4), 0, model.get("data").last), line }); model.save_changes(); };
  svg.addEventListener("pointermove", (e) => s && look(svg.lastChild, model.get("data"), s, ...place(e)));
  svg.addEventListener("pointerleave", () => svg.lastChild.replaceChildren());
  svg.addEventListener("click", (e) => { if (s) go(...picked(model.get("data"), s, ...place(e), model.get("line"))); svg.focus(); });
  svg.addEventListener("keydown", (e) => {
    const ids = model.get("data").lines.map((l) => l.id), i = ids.indexOf(model.get("line")), n = ids.length;
    const by = { ArrowLeft: -.01, ArrowRight: .01, PageDown: -.05, PageUp: .05, Home: -1, End: 1 }[e.key], turn = { ArrowDown: 1, ArrowUp: -1 }[e.key];
    if (by === undefined && turn === undefined) return;
    e.preventDefault(); e.stopPropagation();
    go(model.get("at") + (by ?? 0), turn && n ? ids[(i + turn + n) % n] : model.get("line"));
  });
  const sized = new ResizeObserver(() => el.clientWidth !== width && draw());
  sized.observe(el);
  model.on("change:data change:at change:line", draw);
  draw();
  return () => { sized.disconnect(); model.off("change:data change:at change:line", draw); };
}

export default { render };
