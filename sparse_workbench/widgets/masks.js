// A matrix as a map: squares of TILE texels come from the kernel as bytes, at the level at which they are seen, and are kept here.
const TILE = 256, KEEP = 320, EDGE = { left: 62, top: 46, right: 44, bottom: 36 }, CHART = [256, 176];
const FONT = "11px system-ui, -apple-system, 'Segoe UI', sans-serif", SMALL = "10px system-ui, -apple-system, 'Segoe UI', sans-serif";
const MODES = { weight: "Weight", score: "Score", mask: "Mask", difference: "Difference" };
const shared = new WeakMap();      // model -> what all its views have in common

class Store {                      // squares by mode, level and place; one for each model, whatever the number of views
  constructor(model) {
    Object.assign(this, { model, tiles: new Map(), pending: new Set(), views: new Set(), values: null, probe: null, asked: 0 });
    this.onMessage = (m, buffers) => this.receive(m, buffers);
    this.onMeta = () => {
      this.pending.clear();
      this.values = this.probe = null;
      for (const v of this.views) v.again();
      this.redraw();
    };
    model.on("msg:custom", this.onMessage);
    model.on("change:meta", this.onMeta);
  }
  close() { this.model.off("msg:custom", this.onMessage); this.model.off("change:meta", this.onMeta); this.tiles.clear(); }
  redraw() { for (const v of this.views) v.changed(); }
  version(mode) { return this.model.get("meta").versions?.[mode] ?? 0; }
  receive(m, buffers) {
    if (m.kind === "tiles") m.list.forEach((t, i) => this.add(t, buffers[i]));
    if (m.kind === "probe") { this.probe = m; for (const v of this.views) v.answered(); }
    if (m.kind === "values") { this.values = { ...m, weight: floats(buffers[0]), score: floats(buffers[1]) }; this.asked = ""; }
    this.redraw();
  }
  add(t, buffer) {
    const key = `${t.mode}|${t.z}|${t.y}|${t.x}`;
    this.pending.delete(key);
    if (!t.h || !t.w || t.version < (this.tiles.get(key)?.version ?? -1)) return;   // nothing there: asked before the layer changed
    this.tiles.delete(key);
    this.tiles.set(key, { ...t, bytes: new Uint8Array(buffer.buffer, buffer.byteOffset, buffer.byteLength), colours: "", image: null });
    while (this.tiles.size > KEEP) this.tiles.delete(this.tiles.keys().next().value);
  }
  ask(mode, z, places) {           // only what is neither here nor on its way
    const want = places.filter(([y, x]) => {
      const key = `${mode}|${z}|${y}|${x}`, have = this.tiles.get(key);
      return !this.pending.has(key) && (!have || have.version !== this.version(mode));
    });
    if (!want.length) return;
    for (const [y, x] of want) this.pending.add(`${mode}|${z}|${y}|${x}`);
    this.model.send({ kind: "tiles", mode, z, want });
  }
  image(t, palette) {              // coloured once for each palette
    if (t.colours === palette.key) return t.image;
    const c = t.image ?? document.createElement("canvas"), n = t.h * t.w;
    [c.width, c.height] = [t.w, t.h];
    const out = new ImageData(t.w, t.h), px = new Uint32Array(out.data.buffer);
    if (palette.lut) for (let i = 0; i < n; i++) px[i] = palette.lut[t.bytes[i]];
    else mix(px, t.bytes, n, palette);
    c.getContext("2d").putImageData(out, 0, 0);
    t.image = c;
    t.colours = palette.key;
    return c;
  }
}

const floats = (b) => new Float32Array(b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength));
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const packed = ([r, g, b]) => (255 << 24) | (Math.round(b) << 16) | (Math.round(g) << 8) | Math.round(r);

function mix(px, bytes, n, { rest, parts }) {      // share of each part, the rest in its own colour
  for (let i = 0; i < n; i++) {
    let r = rest[0], g = rest[1], b = rest[2];
    for (let k = 0; k < parts.length; k++) {
      const a = bytes[k * n + i] / 255, c = parts[k];
      r += a * (c[0] - rest[0]); g += a * (c[1] - rest[1]); b += a * (c[2] - rest[2]);
    }
    px[i] = packed([r, g, b]);
  }
}

const brief = (v) => v === 0 ? "0" : Math.abs(v) >= 1e3 || Math.abs(v) < 1e-2 ? v.toExponential(0).replace(/-/g, "−") : String(+v.toPrecision(2)).replace("-", "−");
const short = (v) => v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3 ? v.toExponential(1).replace(/-/g, "−") : String(+v.toPrecision(3)).replace("-", "−");
const whole = (n) => n.toLocaleString("en-US");
const percent = (v, d = 1) => `${(100 * v).toFixed(d)} %`;
const el = (tag, cls, ...inside) => { const e = document.createElement(tag); if (cls) e.className = cls; e.append(...inside); return e; };

class View {
  constructor(store, root) {
    Object.assign(this, { store, model: store.model, root, at: null, dirty: false, drag: null, hover: null, key: "", stats: { draws: 0, ms: 0, waiting: 0 } });
    this.build();
    this.watch = new ResizeObserver(() => { this.fitted ? this.fit() : this.changed(); });
    this.watch.observe(this.stage);
    this.onAny = () => this.changed();
    for (const e of ["change:mode", "change:dark", "change:margins", "change:facts"]) this.model.on(e, this.onAny);
    store.views.add(this);
    this.changed();
  }
  close() {
    for (const e of ["change:mode", "change:dark", "change:margins", "change:facts"]) this.model.off(e, this.onAny);
    this.watch.disconnect();
    this.store.views.delete(this);
    this.closed = true;
  }
  get meta() { return this.model.get("meta"); }
  get mode() { return this.model.get("mode"); }
  get colours() { return this.meta.colours[this.model.get("dark") ? "dark" : "light"]; }

  build() {
    this.buttons = {};
    const bar = el("div", "sw-bar");
    bar.setAttribute("role", "toolbar");
    const group = el("div", "sw-modes");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "what is shown");
    for (const [mode, text] of Object.entries(MODES)) {
      const b = this.buttons[mode] = el("button", "", text);
      b.onclick = () => { this.model.set("mode", mode); this.model.save_changes(); };
      group.append(b);
    }
    const zoom = el("div", "sw-modes");
    for (const [text, say, f] of [["−", "zoom out", () => this.zoom(.5)], ["+", "zoom in", () => this.zoom(2)], ["1:1", "one pixel for each weight", () => this.zoom(1 / this.at.s)], ["All", "the whole matrix", () => this.fit()]]) {
      const b = el("button", "", text);
      b.title = say; b.setAttribute("aria-label", say);
      b.onclick = f;
      zoom.append(b);
    }
    this.legend = el("div", "sw-legend");
    bar.append(group, zoom);
    this.canvas = el("canvas", "sw-canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", "matrix: arrow keys move, plus and minus zoom, 0 shows everything, shift and arrow keys choose a weight");
    Object.assign(this.canvas, { swStats: this.stats, swView: () => this.at, swAt: () => this.hover, swMove: (x, y) => this.move(x, y) });   // for measurements
    this.stage = el("div", "sw-stage", this.canvas);
    this.readout = el("div", "sw-readout");
    this.readout.setAttribute("aria-live", "polite");
    this.chart = el("canvas", "sw-histogram");
    this.chart.setAttribute("role", "img");
    this.facts = el("div", "sw-facts");
    this.root.append(bar, this.legend, el("div", "sw-both", this.stage, el("div", "sw-side", this.facts, this.chart)), this.readout);
    this.listen();
  }

  listen() {
    const c = this.canvas, place = (e) => { const r = c.getBoundingClientRect(); return [e.clientX - r.left, e.clientY - r.top]; };
    c.addEventListener("pointerdown", (e) => { c.focus(); c.setPointerCapture(e.pointerId); this.drag = [...place(e), this.at.x, this.at.y]; });
    c.addEventListener("pointerup", (e) => { if (this.drag && Math.hypot(place(e)[0] - this.drag[0], place(e)[1] - this.drag[1]) < 3) this.point(...place(e), true); this.drag = null; });
    c.addEventListener("pointercancel", () => { this.drag = null; });
    c.addEventListener("pointerleave", () => { if (!this.drag) { this.hover = this.marked ?? null; this.changed(); } });
    c.addEventListener("pointermove", (e) => {
      if (e.clientX === this.rest?.[0] && e.clientY === this.rest?.[1]) return;       // the page moved, not the mouse
      this.rest = [e.clientX, e.clientY];
      const [px, py] = place(e);
      if (this.drag) this.move(this.drag[2] - (px - this.drag[0]) / this.at.s, this.drag[3] - (py - this.drag[1]) / this.at.s);
      else this.point(px, py);
    });
    c.addEventListener("dblclick", (e) => this.zoom(4, ...place(e)));
    c.addEventListener("wheel", (e) => {
      if (document.activeElement !== c && !e.ctrlKey) return;       // the page scrolls until the matrix is chosen
      e.preventDefault();
      this.zoom(Math.exp(-Math.max(-120, Math.min(120, e.deltaY)) / 240), ...place(e));
    }, { passive: false });
    c.addEventListener("keydown", (e) => this.pressed(e));
    c.addEventListener("focus", () => this.changed());
    c.addEventListener("blur", () => this.changed());
  }

  pressed(e) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key], { w, h } = this.box();
    if (step && e.shiftKey) {                                       // one weight further
      const [r, c] = this.hover ?? [Math.floor(this.at.y + h / this.at.s / 2), Math.floor(this.at.x + w / this.at.s / 2)];
      this.mark(r + step[1], c + step[0]);
    } else if (step) this.move(this.at.x + step[0] * w / this.at.s / 8, this.at.y + step[1] * h / this.at.s / 8);
    else if (e.key === "+" || e.key === "=") this.zoom(2);
    else if (e.key === "-" || e.key === "_") this.zoom(.5);
    else if (e.key === "0" || e.key === "Home") this.fit();
    else if (["1", "2", "3", "4"].includes(e.key) && !Object.values(this.buttons)[e.key - 1].hidden) Object.values(this.buttons)[e.key - 1].click();
    else if (e.key === "Escape") { this.marked = this.hover = null; c.blur(); }
    else return;
    e.preventDefault();
    e.stopPropagation();
  }

  // where we look: x, y = weight at the upper left corner, s = pixels for a weight
  box() { return { w: Math.max(1, this.width - EDGE.left - EDGE.right), h: Math.max(1, this.height - EDGE.top - EDGE.bottom) }; }
  smallest() { const { w, h } = this.box(); return Math.min(w / this.meta.cols, h / this.meta.rows); }
  fit() {
    this.size();
    this.at = { x: 0, y: 0, s: this.smallest() };
    this.fitted = true;
    this.move(0, 0);
  }
  move(x, y) {
    const { w, h } = this.box(), { rows, cols } = this.meta, s = this.at.s, lim = (v, n, len, free) => n * s <= len ? free * (n - len / s) : Math.min(Math.max(v, 0), n - len / s);
    this.at = { s, x: lim(x, cols, w, .5), y: lim(y, rows, h, 0) };
    this.changed();
  }
  zoom(by, px, py) {
    const { w, h } = this.box(), mx = (px ?? EDGE.left + w / 2) - EDGE.left, my = (py ?? EDGE.top + h / 2) - EDGE.top;
    const s = Math.min(96, Math.max(this.smallest(), this.at.s * by)), x = this.at.x + mx / this.at.s, y = this.at.y + my / this.at.s;
    this.fitted = s <= this.smallest() * 1.0001;
    this.at.s = s;
    this.move(x - mx / s, y - my / s);
  }
  level() { return Math.min(this.meta.levels, Math.max(0, Math.floor(Math.log2(1 / (this.at.s * this.ratio)) + .3))); }
  point(px, py, stay) {
    const c = Math.floor(this.at.x + (px - EDGE.left) / this.at.s), r = Math.floor(this.at.y + (py - EDGE.top) / this.at.s), { w, h } = this.box();
    if (px < EDGE.left || py < EDGE.top || px > EDGE.left + w || py > EDGE.top + h || r < 0 || c < 0 || r >= this.meta.rows || c >= this.meta.cols) return;
    if (stay) this.marked = this.marked && this.marked[0] === r && this.marked[1] === c ? null : [r, c];
    this.look(r, c);
  }
  mark(r, c) {
    r = Math.min(this.meta.rows - 1, Math.max(0, r)); c = Math.min(this.meta.cols - 1, Math.max(0, c));
    const { w, h } = this.box(), s = this.at.s, into = (v, from, len) => Math.min(Math.max(from, v + 1 - len / s), v);
    this.marked = [r, c];
    this.fitted = false;
    this.move(into(c, this.at.x, w), into(r, this.at.y, h));
    this.look(r, c);
  }
  look(r, c) {
    if (this.hover && this.hover[0] === r && this.hover[1] === c) return;
    this.hover = [r, c];
    this.changed();
    if (this.stats.waiting) { this.next = [r, c]; return; }
    this.stats.waiting = 1;
    this.model.send({ kind: "probe", row: r, col: c });
  }

  again() {                                   // what is known of the weight under the cursor may have changed
    this.stats.waiting = 0;
    if (!this.hover || `${this.meta.name}|${this.meta.rows}|${this.meta.cols}` !== this.key) return;
    const [r, c] = this.hover;
    this.hover = null;
    this.look(r, c);
  }
  answered() {                                // one question at a time; the last place pointed at comes next
    this.stats.waiting = 0;
    if (!this.next) return;
    const [r, c] = this.next;
    this.next = this.hover = null;
    this.look(r, c);
  }

  changed() {
    if (this.dirty || this.closed) return;
    this.dirty = true;
    requestAnimationFrame(() => { this.dirty = false; if (!this.closed) this.draw(); });
  }
  size() {
    const { rows, cols } = this.meta, wide = Math.max(260, this.root.clientWidth - 270 > 360 ? this.root.clientWidth - 270 : this.root.clientWidth), tall = 560;
    const extra = [EDGE.left + EDGE.right, EDGE.top + EDGE.bottom];
    const s = Math.min((wide - extra[0]) / cols, (tall - extra[1]) / rows);
    this.width = Math.round(wide);
    this.height = Math.round(Math.min(tall, Math.max(rows * s + extra[1], 400)));
    this.ratio = window.devicePixelRatio || 1;
    for (const [c, w, h] of [[this.canvas, this.width, this.height], [this.chart, ...CHART]]) {
      if (c.width === Math.round(w * this.ratio) && c.height === Math.round(h * this.ratio)) continue;
      c.width = Math.round(w * this.ratio); c.height = Math.round(h * this.ratio);
      c.style.width = `${w}px`; c.style.height = `${h}px`;
    }
  }

  draw() {
    const began = performance.now(), meta = this.meta;
    if (!meta.rows || !this.root.clientWidth) return;
    const key = `${meta.name}|${meta.rows}|${meta.cols}`;
    if (key !== this.key) { this.key = key; this.hover = this.marked = null; this.store.probe = null; this.fit(); }
    this.size();
    if (this.at.s < this.smallest()) { this.at.s = this.smallest(); this.move(this.at.x, this.at.y); }
    const g = this.canvas.getContext("2d"), { w, h } = this.box();
    g.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    g.clearRect(0, 0, this.width, this.height);
    g.save();
    g.beginPath(); g.rect(EDGE.left, EDGE.top, w, h); g.clip();
    this.squares(g, w, h);
    this.structure(g, w, h);
    this.numbers(g, w, h);
    this.cross(g);
    g.restore();
    this.axes(g, w, h);
    this.margins(g, w, h);
    this.words();
    this.bars();
    this.stats.draws++;
    this.stats.ms += performance.now() - began;
  }

  palette(z) {
    const c = this.colours, mode = this.mode, key = `${mode}|${z === 0}|${this.model.get("dark")}`;
    if (this.known?.key === key) return this.known;
    if (mode === "mask") return this.known = { key, rest: rgb(c.none), parts: [rgb(c.kept)] };
    if (mode === "difference") return this.known = { key, rest: rgb(c.none), parts: [rgb(c.both), rgb(c.kept), rgb(c.pruned)] };
    const i = 3 * this.model.get("dark") + (mode === "score" ? 2 : z === 0 ? 0 : 1), v = this.model.get("luts"), b = new Uint8Array(v.buffer, v.byteOffset + i * 768, 768);
    return this.known = { key, bytes: b, lut: Uint32Array.from({ length: 256 }, (_, k) => packed(b.subarray(3 * k, 3 * k + 3))) };
  }

  squares(g, w, h) {
    const z = this.level(), mode = this.mode, { x, y, s } = this.at, side = TILE << z, palette = this.palette(z), want = [];
    g.imageSmoothingEnabled = false;
    const last = (n) => Math.ceil(n / side) - 1;
    for (let ty = Math.max(0, Math.floor(y / side)); ty <= Math.min(last(this.meta.rows), Math.floor((y + h / s) / side)); ty++)
      for (let tx = Math.max(0, Math.floor(x / side)); tx <= Math.min(last(this.meta.cols), Math.floor((x + w / s) / side)); tx++) {
        const t = this.store.tiles.get(`${mode}|${z}|${ty}|${tx}`);
        if (!t || t.version !== this.store.version(mode)) want.push([ty, tx]);
        if (t) this.square(g, t, palette);
        else this.above(g, mode, z, ty, tx, palette);
      }
    this.store.ask(mode, z, want);
    this.canvas.dataset.missing = want.length;
    this.canvas.dataset.version = this.store.version(mode);
    this.canvas.dataset.level = z;
  }
  square(g, t, palette) {
    const { x, y, s } = this.at, side = TILE << t.z, f = s * (1 << t.z), { rows, cols } = this.meta;
    const left = EDGE.left + (t.x * side - x) * s, top = EDGE.top + (t.y * side - y) * s;
    g.save();
    g.beginPath(); g.rect(EDGE.left + (0 - x) * s, EDGE.top + (0 - y) * s, cols * s, rows * s); g.clip();
    g.drawImage(this.store.image(t, palette), left, top, t.w * f, t.h * f);
    g.restore();
  }
  above(g, mode, z, ty, tx, palette) {        // until the square is here: its part of a coarser one
    for (let up = 1; z + up <= this.meta.levels; up++) {
      const t = this.store.tiles.get(`${mode}|${z + up}|${ty >> up}|${tx >> up}`);
      if (!t) continue;
      const side = TILE << z, { x, y, s } = this.at;
      g.save();
      g.beginPath(); g.rect(EDGE.left + (tx * side - x) * s, EDGE.top + (ty * side - y) * s, side * s + .5, side * s + .5); g.clip();
      this.square(g, t, palette);
      g.restore();
      return;
    }
  }

  structure(g, w, h) {                        // N:M groups tinted, block grid, kernel positions, single weights
    const { x, y, s } = this.at, { rows, cols, group, tile, inner } = this.meta, c = this.colours;
    const lines = (nx, ny, colour, width) => {
      g.strokeStyle = colour; g.lineWidth = width;
      g.beginPath();
      if (nx) for (let i = Math.max(0, Math.ceil(x / nx)); i * nx <= Math.min(cols, x + w / s); i++) { const p = EDGE.left + (i * nx - x) * s; g.moveTo(p, EDGE.top + Math.max(0, -y * s)); g.lineTo(p, EDGE.top + Math.min(h, (rows - y) * s)); }
      if (ny) for (let i = Math.max(0, Math.ceil(y / ny)); i * ny <= Math.min(rows, y + h / s); i++) { const p = EDGE.top + (i * ny - y) * s; g.moveTo(EDGE.left + Math.max(0, -x * s), p); g.lineTo(EDGE.left + Math.min(w, (cols - x) * s), p); }
      g.stroke();
    };
    if (group && s * Math.max(...group) >= 10) {
      const [gr, gc] = group;
      g.fillStyle = c.tint;
      for (let r = Math.max(0, Math.floor(y / gr)); r * gr < Math.min(rows, y + h / s); r++)
        for (let k = Math.max(0, Math.floor(x / gc)); k * gc < Math.min(cols, x + w / s); k++)
          if ((gr > 1 && gc > 1 ? r + k : gr > 1 ? r : k) % 2) { const b = [Math.min(gc, cols - k * gc), Math.min(gr, rows - r * gr)]; g.fillRect(EDGE.left + (k * gc - x) * s, EDGE.top + (r * gr - y) * s, b[0] * s, b[1] * s); if (gc === cols) break; }
      if (s >= 5) lines(gc > 1 ? gc : 0, gr > 1 ? gr : 0, c.line, 1.5);
    }
    if (s >= 9) lines(1, 1, c.faint, .6);
    if (tile && s * Math.min(...tile.filter((n) => n > 1)) >= 5) lines(tile[1] > 1 && tile[1] < cols ? tile[1] : 0, tile[0] > 1 && tile[0] < rows ? tile[0] : 0, c.line, 1);
    if (inner < cols && s * inner >= 16) lines(inner, 0, c.text, 1.2);
  }

  numbers(g, w, h) {                          // the values themselves, where they fit
    const { x, y, s } = this.at, mode = this.mode;
    this.canvas.dataset.numbers = false;
    if (s < 40) return;
    const r0 = Math.max(0, Math.floor(y)), c0 = Math.max(0, Math.floor(x)), r1 = Math.min(this.meta.rows, Math.ceil(y + h / s)), c1 = Math.min(this.meta.cols, Math.ceil(x + w / s));
    const v = this.store.values, key = `${r0}|${c0}|${r1}|${c1}`;
    if (!v || v.row > r0 || v.col > c0 || v.row + v.rows < r1 || v.col + v.cols < c1) {
      if (this.store.asked !== key) { this.store.asked = key; this.model.send({ kind: "values", row: r0, col: c0, rows: r1 - r0, cols: c1 - c0 }); }
      if (!v) return;
    }
    this.canvas.dataset.numbers = true;
    const values = mode === "score" ? v.score : v.weight, t = this.store.tiles, palette = this.palette(0), n = palette.parts;
    g.font = SMALL; g.textAlign = "center"; g.textBaseline = "middle";
    for (let r = Math.max(r0, v.row); r < Math.min(r1, v.row + v.rows); r++) for (let k = Math.max(c0, v.col); k < Math.min(c1, v.col + v.cols); k++) {
      const q = t.get(`${mode}|0|${Math.floor(r / TILE)}|${Math.floor(k / TILE)}`);
      if (!q) continue;
      const i = (r % TILE) * q.w + k % TILE, one = q.h * q.w;
      let ground = n ? palette.rest : [...palette.bytes.subarray(3 * q.bytes[i], 3 * q.bytes[i] + 3)];
      if (n) n.forEach((p, j) => { if (q.bytes[j * one + i] > 127) ground = p; });
      g.fillStyle = .299 * ground[0] + .587 * ground[1] + .114 * ground[2] > 140 ? "#14171b" : "#f5f6f8";
      g.fillText(brief(values[(r - v.row) * v.cols + k - v.col]), EDGE.left + (k + .5 - x) * s, EDGE.top + (r + .5 - y) * s);
    }
  }

  cross(g) {
    if (!this.hover) return;
    const { x, y, s } = this.at, d = Math.max(s, 7), [r, c] = this.hover, px = EDGE.left + (c + .5 - x) * s, py = EDGE.top + (r + .5 - y) * s;
    for (const [colour, width] of [[this.colours.surface, 4], [this.colours.text, 2]]) { g.strokeStyle = colour; g.lineWidth = width; g.strokeRect(px - d / 2, py - d / 2, d, d); }
  }

  axes(g, w, h) {
    const { x, y, s } = this.at, { rows, cols } = this.meta, c = this.colours;
    const x0 = Math.max(EDGE.left, EDGE.left - x * s), x1 = Math.min(EDGE.left + w, EDGE.left + (cols - x) * s), y0 = Math.max(EDGE.top, EDGE.top - y * s), y1 = Math.min(EDGE.top + h, EDGE.top + (rows - y) * s);
    g.strokeStyle = document.activeElement === this.canvas ? c.kept : c.quiet; g.lineWidth = 1;
    g.strokeRect(x0 - .5, y0 - .5, x1 - x0 + 1, y1 - y0 + 1);
    g.font = FONT; g.fillStyle = c.quiet; g.strokeStyle = c.quiet;
    const every = (px) => { const raw = px / s, p = 10 ** Math.floor(Math.log10(raw)); return Math.max(1, [1, 2, 5, 10].map((m) => m * p).find((m) => m >= raw)); };
    g.textAlign = "center"; g.textBaseline = "top";
    const sx = every(64), sy = every(38), half = s >= 6 ? .5 : 0;
    for (let v = Math.max(0, Math.ceil(x / sx)) * sx; v < cols; v += sx) { const p = EDGE.left + (v + half - x) * s; if (p > x1 + 1) break; if (p < x0 - 1) continue; line(g, p, y1 + 1, p, y1 + 5); g.fillText(whole(v), p, y1 + 7); }
    g.textAlign = "right"; g.textBaseline = "middle";
    for (let v = Math.max(0, Math.ceil(y / sy)) * sy; v < rows; v += sy) { const p = EDGE.top + (v + half - y) * s; if (p > y1 + 1) break; if (p < y0 - 1) continue; line(g, x0 - 5, p, x0 - 1, p); g.fillText(whole(v), x0 - 7, p); }
    g.fillStyle = c.text; g.textAlign = "center"; g.textBaseline = "bottom";
    g.fillText(this.meta.across, (x0 + x1) / 2, Math.min(this.height, y1 + 34));
    this.frame = [x0, y0, x1, y1];
    g.save(); g.translate(Math.max(8, x0 - 54), (y0 + y1) / 2); g.rotate(-Math.PI / 2); g.textBaseline = "middle";
    g.fillText("output (row)", 0, 0); g.restore();
  }

  margins(g, w, h) {                          // kept fraction of each column above, of each row to the right
    const view = this.model.get("margins"), { rows, cols } = this.meta;
    if (!view || view.byteLength !== 4 * (rows + cols)) return;
    if (this.sums?.of !== view) {
      const f = floats(view), run = (a) => { const o = new Float64Array(a.length + 1); for (let i = 0; i < a.length; i++) o[i + 1] = o[i] + a[i]; return o; };
      this.sums = { of: view, row: run(f.subarray(0, rows)), col: run(f.subarray(rows)) };
    }
    const [x0, y0, x1, y1] = this.frame, c = this.colours, tall = EDGE.top - 20, wide = EDGE.right - 12, { x, y, s } = this.at;
    const mean = (sum, a, b) => { const n = sum.length - 1, i = Math.min(n - 1, Math.max(0, Math.floor(a))), j = Math.max(i + 1, Math.min(n, Math.ceil(b))); return (sum[j] - sum[i]) / (j - i); };
    g.fillStyle = c.kept; g.globalAlpha = .75;
    for (let p = Math.floor(x0); p < x1; p++) { const a = x + (p - EDGE.left) / s, v = mean(this.sums.col, a, a + 1 / s); g.fillRect(p, y0 - 5 - v * tall, 1, v * tall); }
    for (let p = Math.floor(y0); p < y1; p++) { const a = y + (p - EDGE.top) / s, v = mean(this.sums.row, a, a + 1 / s); g.fillRect(x1 + 5, p, v * wide, 1); }
    g.globalAlpha = 1; g.strokeStyle = c.line; g.lineWidth = 1;
    line(g, x0, y0 - 5 - tall + .5, x1, y0 - 5 - tall + .5); line(g, x1 + 5 + wide - .5, y0, x1 + 5 + wide - .5, y1);
    g.fillStyle = c.quiet; g.font = SMALL; g.textAlign = "left"; g.textBaseline = "bottom";
    g.fillText("kept share of columns, 0 to 1", x0, y0 - 7 - tall);
    g.fillText("rows", x1 + 5, y0 - 3);
  }

  words() {                                   // buttons, legend, readout, facts
    const { mode, meta, colours: c } = this, z = this.level(), set = (e, t) => { if (e.dataset.was !== t) { e.innerHTML = t; e.dataset.was = t; } };
    for (const [m, b] of Object.entries(this.buttons)) { b.setAttribute("aria-pressed", m === mode); b.hidden = m === "difference" && !meta.second; }
    const swatch = (colour, text) => `<span class="sw-swatch" style="background:${colour}"></span>${text} `;
    if (mode === "mask") set(this.legend, swatch(c.kept, "kept") + swatch(c.none, "pruned") + (z ? `<small>shares of ${2 ** z} × ${2 ** z} weights</small>` : ""));
    else if (mode === "difference") set(this.legend, swatch(c.kept, `only ${safe(meta.first)}`) + swatch(c.pruned, `only ${safe(meta.second)}`) + swatch(c.both, "both keep") + swatch(c.none, "both prune"));
    else {
      const p = this.palette(z), [lo, hi] = meta.ranges[`${mode}, ${z}`] ?? [0, 1];
      const stops = Array.from({ length: 17 }, (_, i) => { const k = 3 * Math.round(i * 255 / 16); return `rgb(${p.bytes.subarray(k, k + 3).join()})`; });
      const what = mode === "weight" ? (z ? `mean |w| of ${2 ** z} × ${2 ** z}` : "w") : (z ? `mean of ${2 ** z} × ${2 ** z}` : safe(meta.criterion));
      set(this.legend, `<small>${short(lo)}</small><span class="sw-ramp" style="background:linear-gradient(90deg,${stops.join()})"></span><small>${short(hi)}</small> <span>${what}</span>`);
    }
    const p = this.store.probe;
    set(this.readout, this.hover && p ? said(p, meta) : `<span class="sw-hint">${document.activeElement === this.canvas ? "Drag or arrow keys move, wheel or + − zoom, 0 shows everything, Shift with arrow keys goes from weight to weight" : "Point at a weight. Click into the matrix, then scroll to zoom and drag to move"}</span>`);
    set(this.facts, this.model.get("facts").map(([k, v]) => `<span>${safe(k)}</span><span>${safe(v)}</span>`).join(""));
  }

  bars() {                                    // histogram of what competes
    const hist = this.meta.histogram, g = this.chart.getContext("2d"), c = this.colours, [W, H] = CHART, L = 6, B = 34, T = 32;
    if (!hist) return;
    const key = JSON.stringify([hist, this.model.get("dark"), this.ratio]);
    if (key === this.drawn) return;
    this.drawn = key;
    g.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    g.clearRect(0, 0, W, H);
    const n = hist.kept.length, top = Math.max(1, ...hist.kept.map((v, i) => v + hist.pruned[i])), bw = (W - 2 * L) / n, [lo, hi] = [hist.edges[0], hist.edges[n]];
    const high = (v) => v ? Math.max(1, Math.sqrt(v / top) * (H - T - B)) : 0;
    for (let i = 0; i < n; i++) {
      const all = high(hist.kept[i] + hist.pruned[i]), low = (hist.pruned[i] / Math.max(1, hist.kept[i] + hist.pruned[i])) * all;
      g.fillStyle = c.pruned; g.fillRect(L + i * bw, H - B - low, bw - .6, low);
      g.fillStyle = c.kept; g.fillRect(L + i * bw, H - B - all, bw - .6, all - low);
    }
    g.fillStyle = c.text; g.font = FONT; g.textBaseline = "top"; g.textAlign = "left";
    g.fillText(`${whole(hist.counted)}${hist.counted < hist.of ? ` of ${whole(hist.of)}` : ""} ${hist.what}`, L, 1);
    if (hist.threshold !== null) {
      const p = L + (Math.min(hi, hist.threshold) - lo) / (hi - lo) * (W - 2 * L);
      g.strokeStyle = c.text; g.lineWidth = 1.5; g.setLineDash([4, 3]); line(g, p, T - 6, p, H - B); g.setLineDash([]);
      g.textAlign = p > W / 2 ? "right" : "left";
      g.fillText(`cut ${short(hist.threshold)}`, p + (p > W / 2 ? -4 : 4), T - 15);
    }
    g.strokeStyle = c.quiet; g.lineWidth = 1; line(g, L, H - B + .5, W - L, H - B + .5);
    g.fillStyle = c.quiet; g.textAlign = "left"; g.fillText(short(lo), L, H - B + 4);
    g.textAlign = "right"; g.fillText(`${hist.clipped ? "≥ " : ""}${short(hi)}`, W - L, H - B + 4);
    g.fillStyle = c.text; g.textAlign = "center"; g.fillText(`score: ${this.meta.criterion}`, W / 2, H - B + 17);
    this.chart.setAttribute("aria-label", `histogram of ${hist.counted} ${hist.what}, square-root scale` + (hist.threshold === null ? "" : `, cut at ${short(hist.threshold)}`));
  }
}

const line = (g, a, b, c, d) => { g.beginPath(); g.moveTo(a, b); g.lineTo(c, d); g.stroke(); };
const safe = (t) => String(t).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

function said(p, meta) {
  const [out, inp, ...kernel] = p.index, b = (t) => `<b>${t}</b>`, verdict = (kept) => kept ? `<b class="sw-kept">kept</b>` : `<b class="sw-pruned">pruned</b>`;
  return [`out ${b(whole(out))} · in ${b(whole(inp))}${kernel.length ? ` · kernel ${b(kernel.join(", "))}` : ""}`, `weight ${b(short(p.weight))}`, `score ${b(short(p.score))}`,
    p.rank === null ? "takes no part" : `rank ${b(whole(p.rank))} of ${whole(p.of)} ${safe(meta.among)}`,
    meta.second ? `${safe(meta.first)}: ${verdict(p.kept)}, ${safe(meta.second)}: ${verdict(p.other)}` : verdict(p.kept)].map((t) => `<span>${t}</span>`).join("");
}

function initialize({ model }) {
  const store = new Store(model);
  shared.set(model, store);
  return () => { store.close(); shared.delete(model); };
}

function render({ model, el: root }) {
  root.classList.add("sw-masks");
  const store = shared.get(model) ?? new Store(model);
  shared.set(model, store);
  const view = new View(store, root);
  return () => view.close();
}

export default { initialize, render };
