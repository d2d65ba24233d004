// Two recorded runs side by side: a map of layers and steps with curves below it, and one cursor over both.
// All that is drawn comes from one float32 buffer for each run, so that moving the cursor asks nothing of the kernel.

const GAP = 30, CURVE = 76, THIN = 44, RIGHT = 12, TOP = 6, BOTTOM = 34
const SIDES = ['left', 'right']

const make = (tag, name, parent) => { const e = document.createElement(tag); e.className = name; parent && parent.append(e); return e }
const finite = xs => Array.from(xs || []).filter(Number.isFinite)

function unpack(run) {
  if (!run || !run.name) return null
  const b = run.values, f = new Float32Array(b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength))
  const array = key => key in run.arrays ? f.subarray(run.arrays[key][0], run.arrays[key][0] + run.arrays[key][1]) : null
  const prefix = shared(run.sites)
  return { ...run, t: array('t'), heat: array('heat'), total: array('total'), array,
           labels: run.sites.map(s => s.slice(prefix).replace(/\.weight$/, '')) }
}

function shared(names) {          // length of the dotted beginning that all names have in common
  if (names.length < 2) return 0
  let n = 0
  while (n < names[0].length && names.every(s => s[n] === names[0][n])) n++
  return names[0].lastIndexOf('.', n - 1) + 1
}

function at(t, step) {            // the record that a step belongs to: the first at or after it; -1 beyond the last
  let low = 0, high = t.length
  while (low < high) { const mid = (low + high) >> 1; if (t[mid] < step) low = mid + 1; else high = mid }
  return low < t.length ? low : -1
}

const begin = t => t.length > 1 ? Math.max(0, 2 * t[0] - t[1]) : 0     // where the first record's cell starts
const clampAt = (t, step) => { const i = at(t, step); return i < 0 ? t.length - 1 : i }

export function say(v) {          // a number for people
  if (v === null || v === undefined || !Number.isFinite(v)) return '–'
  if (Number.isInteger(v) && Math.abs(v) < 1e9) return v.toLocaleString('en-US')
  const a = Math.abs(v)
  return a >= 1e5 || a < 1e-3 ? v.toExponential(2).replace(/\.?0*e\+?/, 'e') : String(+v.toPrecision(4))
}

function linearTicks(low, high, n) {
  const raw = (high - low) / n, mag = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map(k => k * mag).find(s => s >= raw * .999)
  const out = []
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : +v.toPrecision(12))
  return out
}

function logTicks(low, high) {
  const a = Math.log10(low), b = Math.log10(high), out = []
  const steps = b - a < 1.2 ? [1, 2, 5] : [1], every = Math.max(1, Math.ceil((b - a) / 3.5))
  for (let d = Math.floor(a); d <= Math.ceil(b); d++) if (steps.length > 1 || d % every === 0)
    for (const s of steps) { const v = s * 10 ** d; if (v >= low * .999 && v <= high * 1.001) out.push(v) }
  return out.length ? out : [low, high]
}

function axis(values, log, zero) {      // limits, ticks and a map to [0, 1]
  const v = finite(values).filter(x => !log || x > 0)
  if (!v.length) return { low: 0, high: 1, ticks: [], at: () => NaN, log: false }
  let low = v.reduce((a, b) => Math.min(a, b)), high = v.reduce((a, b) => Math.max(a, b))
  if (log) {
    if (high / low < 1.5) { low /= 1.5; high *= 1.5 }
    const a = Math.log(low) - .06 * Math.log(high / low), b = Math.log(high) + .06 * Math.log(high / low)
    return { low, high, log, ticks: logTicks(Math.exp(a), Math.exp(b)), at: x => x > 0 ? (Math.log(x) - a) / (b - a) : NaN }
  }
  if (low > 0 && (low < .5 * high || zero)) low = 0
  if (high - low < 1e-12 * Math.max(1, Math.abs(high))) { const d = Math.abs(high) / 2 || 1; low = high === 0 ? 0 : high - d; high += d }
  const pad = .06 * (high - low), b = high + pad, a = low === 0 ? 0 : low - pad
  return { low, high, log: false, ticks: linearTicks(a, b, 3), at: x => (x - a) / (b - a) }
}

function colours(scale, lut, zero) { // value -> [r, g, b, a]
  const a = scale.log ? Math.log(scale.low) : scale.low, b = scale.log ? Math.log(scale.high) : scale.high
  return v => {
    if (!Number.isFinite(v)) return [0, 0, 0, 0]
    if (scale.log && v <= 0) return [...zero, 255]
    const x = ((scale.log ? Math.log(v) : v) - a) / (b - a), i = 3 * Math.max(0, Math.min(255, Math.round(255 * x)))
    return [lut[i], lut[i + 1], lut[i + 2], 255]
  }
}

const rgb = text => { const c = document.createElement('canvas').getContext('2d', { willReadFrequently: true }); c.fillStyle = text; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3) }

function theme(root) {            // colours of the page, and ours that stand on it
  const css = getComputedStyle(root), of = (name, other) => css.getPropertyValue(name).trim() || other
  const text = of('--jp-ui-font-color1', css.color || '#24292f'), back = of('--jp-layout-color0', '#ffffff')
  const [r, g, b] = rgb(back), dark = .3 * r + .59 * g + .11 * b < 110
  return { text, back, dark, quiet: dark ? '#a3abb8' : '#5b6470', line: dark ? '#343a43' : '#e3e6ea', frame: dark ? '#59616d' : '#aab1bb',
           zero: rgb(dark ? '#2b3037' : '#eceef1'), left: dark ? '#86d69a' : '#3a7d44', right: dark ? '#cfa6e8' : '#8a4f9e',  // not the blue of kept and the orange of pruned
           font: of('--jp-ui-font-family', 'system-ui, sans-serif') }
}

// One run

class Panel {
  constructor(side, parent, move) {
    this.side = side
    this.box = make('section', 'swf-panel', parent)
    const head = make('header', 'swf-head', this.box)
    this.chip = make('span', 'swf-chip', head)
    this.name = make('b', 'swf-name', head)
    this.state = make('span', 'swf-state', head)
    this.read = make('div', 'swf-read', this.box)
    this.read.setAttribute('aria-live', 'polite')
    this.fields = Object.fromEntries(['step', 'layer', 'value', 'total', 'loss', 'rate'].map(k => [k, make('span', 'swf-' + k, this.read)]))
    this.stage = make('div', 'swf-stage', this.box)
    this.under = make('canvas', 'swf-under', this.stage)
    this.over = make('canvas', 'swf-over', this.stage)
    this.over.tabIndex = 0
    this.over.setAttribute('role', 'application')
    this.over.addEventListener('pointermove', e => move.hover(this, e))
    this.over.addEventListener('pointerleave', () => move.leave())
    this.over.addEventListener('pointerdown', e => move.pin(this, e))
    this.over.addEventListener('keydown', e => move.key(this, e))
  }

  size(width, left, rows, curves) { // returns whether there is room
    const scale = window.devicePixelRatio || 1
    Object.assign(this, { width, left })
    this.heat = { top: TOP, h: Math.max(104, Math.min(392, rows * (rows > 24 ? 8 : rows > 12 ? 13 : 28))) }
    let top = this.heat.top + this.heat.h + GAP
    this.curves = curves.map(c => { const h = c.thin ? THIN : CURVE, out = { ...c, top, h }; top += h + GAP; return out })
    this.height = top - GAP + BOTTOM
    for (const c of [this.under, this.over]) {
      c.width = Math.round(width * scale); c.height = Math.round(this.height * scale)
      c.style.width = width + 'px'; c.style.height = this.height + 'px'
      c.getContext('2d').setTransform(scale, 0, 0, scale, 0, 0)
    }
    this.stage.style.height = this.height + 'px'
    this.w = width - left - RIGHT
    return this.w > 40
  }

  x(step) { return this.left + this.w * step / this.span }
  site(r) { return r.sites.includes(this.shown.layer) ? this.shown.layer : r.sites[0] }  // whose curve is drawn
  unit(c) { return c.key === 'profile' ? c.unit : this.run.units[c.names[0]] ?? c.unit }
  row(y) { return Math.floor((y - this.heat.top) / this.heat.h * this.run.sites.length) }

  draw(run, shown, look) {        // everything but the cursor
    Object.assign(this, { run, span: shown.span, look, shown })
    this.chip.style.background = look[this.side]
    this.name.textContent = run.name; this.name.title = run.name
    this.state.textContent = run.state || ''
    this.over.setAttribute('aria-label', `${run.name}: ${shown.scale.label} (${shown.scale.unit}) of ${run.sites.length} layers over ${run.span} steps. Arrow keys move the cursor, Escape takes it away.`)
    const g = this.under.getContext('2d')
    g.clearRect(0, 0, this.width, this.height)
    g.font = `11px ${look.font}`
    this.map(g)
    for (const c of this.curves) this.curve(g, c)
    this.steps(g)
  }

  map(g) {
    const { run, look, heat, w, left } = this, n = run.sites.length, m = run.t.length
    if (n && m) {
      const cols = Math.max(1, Math.round(w * (window.devicePixelRatio || 1))), image = new ImageData(cols, n), colour = colours(this.shown.scale, this.shown.lut, look.zero)
      const first = begin(run.t), of = new Int32Array(cols)
      for (let c = 0; c < cols; c++) { const s = (c + .5) / cols * this.span; of[c] = s <= first ? -1 : at(run.t, s) }
      for (let i = 0; i < n; i++) {
        const known = new Map()
        for (let c = 0; c < cols; c++) {
          const j = of[c]
          if (j < 0) continue
          if (!known.has(j)) known.set(j, colour(run.heat[i * m + j]))
          image.data.set(known.get(j), 4 * (i * cols + c))
        }
      }
      const tile = document.createElement('canvas')
      tile.width = cols; tile.height = n
      tile.getContext('2d').putImageData(image, 0, 0)
      g.imageSmoothingEnabled = false
      g.drawImage(tile, left, heat.top, w, heat.h)
      const h = heat.h / n
      g.fillStyle = look.back
      if (h >= 7) for (let i = 1; i < n; i++) g.fillRect(left, Math.round(heat.top + i * h) - .5, w, h >= 14 ? 1.5 : 1)
    }
    g.strokeStyle = look.frame; g.lineWidth = 1
    g.strokeRect(left - .5, heat.top - .5, w + 1, heat.h + 1)
    const every = Math.max(1, Math.ceil(13 * n / heat.h))
    g.fillStyle = look.text; g.textAlign = 'right'; g.textBaseline = 'middle'
    for (let i = 0; i < n; i += every) g.fillText(fit(g, run.labels[i], left - 10), left - 7, heat.top + (i + .5) * heat.h / n)
  }

  lines(c) {                      // what a curve panel shows: own run in full, the other run quietly
    if (c.key !== 'profile') return this.others(r => c.names.map((k, i) => r.units[k] === this.run.units[k] && { t: r.array(k + ':t'), v: r.array(k), dash: i ? [5, 3] : [], name: k }))
    return this.others(r => {
      const i = r.sites.indexOf(this.site(r)), m = r.t.length
      return [i < 0 ? null : { t: r.t, v: r.heat.subarray(i * m, (i + 1) * m), dash: [], name: 'layer' }, r.total && { t: r.t, v: r.total, dash: [2, 3], name: 'all layers' }]
    })
  }
  others(of) {
    const out = []
    for (const side of [...SIDES].sort(s => s === this.side ? 1 : -1)) {
      const r = this.shown.runs[side]
      if (r) for (const line of of(r)) if (line && line.v && line.v.length) out.push({ ...line, side, own: side === this.side })
    }
    return out
  }

  curve(g, c) {
    const { look, w, left } = this, found = this.lines(c), all = finite(found.flatMap(l => Array.from(l.v))), few = all.filter(v => v > 0)
    const log = c.key === 'profile' ? this.shown.scale.log : c.thin && few.length === all.length && Math.max(...few) > 15 * Math.min(...few)
    const y = c.axis = axis(all, log, c.thin), place = v => c.top + c.h * (1 - y.at(v))
    c.found = found; c.place = place
    g.lineWidth = 1; g.textBaseline = 'middle'; g.textAlign = 'right'
    for (const v of y.ticks) {
      const at = Math.round(place(v)) + .5
      if (at < c.top - 1 || at > c.top + c.h + 1) continue
      g.strokeStyle = look.line; g.beginPath(); g.moveTo(left, at); g.lineTo(left + w, at); g.stroke()
      g.fillStyle = look.quiet; g.fillText(say(v), left - 7, at)
    }
    g.strokeStyle = look.frame; g.beginPath(); g.moveTo(left - .5, c.top); g.lineTo(left - .5, c.top + c.h + .5); g.lineTo(left + w, c.top + c.h + .5); g.stroke()
    this.caption(g, c)
    g.save(); g.beginPath(); g.rect(left, c.top - 2, w + 1, c.h + 4); g.clip()
    for (const l of found) {
      g.globalAlpha = l.own ? 1 : .38; g.strokeStyle = look[l.side]; g.lineWidth = l.own ? 1.8 : 1.3; g.setLineDash(l.dash); g.lineJoin = 'round'
      g.beginPath()
      let pen = false
      for (let i = 0; i < l.t.length; i++) {
        const py = place(l.v[i]), px = this.x(l.t[i])
        if (!Number.isFinite(py)) { pen = false; continue }
        if (!pen) g.moveTo(px, py); else { if (c.steps) g.lineTo(px, place(l.v[i - 1])); g.lineTo(px, py) }
        pen = true
      }
      g.stroke()
    }
    g.restore(); g.setLineDash([]); g.globalAlpha = 1
  }

  caption(g, c) {
    const { look, left } = this
    let x = left, y = c.top - 10
    const put = (s, colour) => { g.fillStyle = colour; g.fillText(s, x, y); x += g.measureText(s).width }
    const stroke = dash => { g.strokeStyle = look[this.side]; g.lineWidth = 1.8; g.setLineDash(dash); g.beginPath(); g.moveTo(x, y); g.lineTo(x + 18, y); g.stroke(); g.setLineDash([]); x += 22 }
    g.textAlign = 'left'; g.textBaseline = 'middle'
    const keys = c.key === 'profile' ? [[[], fit(g, this.site(this.run).replace(/\.weight$/, ''), this.w - 200)], ...(this.run.total ? [[[2, 3], 'all layers']] : [])]
      : c.names.length > 1 ? c.names.map((n, i) => [i ? [5, 3] : [], n]) : []
    if (c.key !== 'profile' && !keys.length) put(c.names[0], look.text)
    for (const [dash, text] of keys) { stroke(dash); put(text + '   ', look.text) }
    put(` (${this.unit(c)})`.replace(/^ (?=\()/, keys.length ? '' : ' '), look.quiet)
  }

  steps(g) {
    const { look, w, left } = this, last = this.curves.at(-1), bottom = last.top + last.h
    g.textAlign = 'center'; g.textBaseline = 'top'
    for (const v of linearTicks(0, this.span, Math.max(2, Math.floor(w / 110)))) {
      const x = this.x(v)
      for (const y of [this.heat.top + this.heat.h, bottom]) { g.strokeStyle = look.frame; g.lineWidth = 1; g.beginPath(); g.moveTo(x, y + 1); g.lineTo(x, y + 4.5); g.stroke() }
      const half = g.measureText(say(v)).width / 2
      g.fillStyle = look.quiet; g.fillText(say(v), Math.min(x, this.width - half - 1), bottom + 6)
    }
    g.fillStyle = look.text; g.fillText('optimizer step', left + w / 2, bottom + 19)
  }

  // The cursor: a line through all charts, the cell, dots on the curves, the values in words
  mark(cursor) {
    const g = this.over.getContext('2d'), { run, look, heat, left } = this
    g.clearRect(0, 0, this.width, this.height)
    const say_ = (k, text) => { if (this.fields[k].textContent !== text) this.fields[k].textContent = text }
    if (!cursor || !run) {
      for (const k in this.fields) say_(k, '')
      say_('step', run && run.t.length ? 'point at a chart, or focus it and use the arrow keys' : 'nothing recorded yet')
      delete this.box.dataset.step; delete this.box.dataset.layer
      return
    }
    const j = at(run.t, cursor.step), i = run.sites.indexOf(cursor.layer), step = j < 0 ? null : run.t[j], n = run.sites.length, m = run.t.length
    const value = i < 0 || j < 0 ? NaN : run.heat[i * m + j]
    const loss = this.curves.find(c => c.key === 'loss'), rate = this.curves.find(c => c.key === 'rate')
    const read = c => { if (!c) return NaN; const t = run.array(c.names[0] + ':t'), v = run.array(c.names[0]); return t && t.length && cursor.step <= t.at(-1) ? v[clampAt(t, cursor.step)] : NaN }
    this.box.dataset.step = step === null ? '' : step; this.box.dataset.layer = i < 0 ? '' : cursor.layer
    say_('step', step === null ? `step ${say(cursor.step)}: no record` : `step ${say(step)}`)
    say_('layer', i < 0 ? `no layer ${cursor.layer}` : cursor.layer.replace(/\.weight$/, ''))
    say_('value', `${say(value)} ${this.shown.scale.unit}`)
    say_('total', run.total && j >= 0 && this.shown.scale.measure !== 'effective' ? `all layers ${say(run.total[j])}` : '')
    say_('loss', loss ? `${loss.names[0]} ${say(read(loss))} ${this.unit(loss)}` : '')
    say_('rate', rate ? `learning rate ${say(read(rate))}` : '')
    const x = this.x(step === null ? cursor.step : step), bottom = this.curves.at(-1)
    g.strokeStyle = look.text; g.globalAlpha = .75; g.lineWidth = 1
    g.beginPath(); g.moveTo(x, heat.top); g.lineTo(x, bottom.top + bottom.h); g.stroke(); g.globalAlpha = 1
    if (i >= 0) {
      const y = heat.top + i * heat.h / n, h = heat.h / n, from = j > 0 ? this.x(run.t[j - 1]) : this.x(begin(run.t)), wide = Math.max(3, x - from)
      g.strokeStyle = look.text; g.globalAlpha = .8; g.strokeRect(left - .5, y - .5, this.w + 1, h + 1); g.globalAlpha = 1
      if (j >= 0) { g.lineWidth = 3.5; g.strokeStyle = '#000'; g.strokeRect(x - wide, y, wide, h); g.lineWidth = 1.6; g.strokeStyle = '#fff'; g.strokeRect(x - wide, y, wide, h) }
      g.fillStyle = look.back; g.fillRect(0, y + h / 2 - 8, left - 4, 16)
      g.font = `600 11px ${look.font}`; g.fillStyle = look.text; g.textAlign = 'right'; g.textBaseline = 'middle'
      g.fillText(fit(g, run.labels[i], left - 10), left - 7, y + h / 2)
    }
    for (const c of this.curves) for (const l of c.found || []) {
      if (!l.own || cursor.step > l.t.at(-1)) continue
      const k = clampAt(l.t, cursor.step), py = c.place(l.v[k]), near = j > 0 ? run.t[j] - run.t[j - 1] : run.span / 100
      if (!Number.isFinite(py) || Math.abs(l.t[k] - cursor.step) > near / 2) continue
      g.beginPath(); g.arc(this.x(l.t[k]), py, 3.6, 0, 7); g.fillStyle = look[l.side]; g.fill(); g.lineWidth = 1.4; g.strokeStyle = look.back; g.stroke()
    }
  }
}

function fit(g, text, width) {    // the end of a name that is too long
  if (g.measureText(text).width <= width) return text
  let s = text
  while (s.length > 1 && g.measureText('…' + s).width > width) s = s.slice(1)
  return '…' + s
}

// The colour bar and what the measure means

function legend(box, scale, lut, look) {
  box.replaceChildren()
  const stops = Array.from({ length: 17 }, (_, i) => { const k = 3 * Math.round(i * 255 / 16); return `rgb(${lut[k]},${lut[k + 1]},${lut[k + 2]})` })
  const title = make('span', 'swf-measure', box)
  title.textContent = scale.label
  const unit = make('span', 'swf-unit', box)
  unit.textContent = `(${scale.unit}${scale.log ? ', logarithmic' : ''})`
  const bar = make('span', 'swf-bar', box)
  const ends = [scale.low, scale.high].map(say), text = i => { const e = make('span', 'swf-end', bar); e.textContent = ends[i] }
  text(0)
  make('span', 'swf-ramp', bar).style.background = `linear-gradient(to right, ${stops})`
  text(1)
  if (scale.log) { make('span', 'swf-zero', bar).style.background = `rgb(${look.zero})`; make('span', 'swf-end', bar).textContent = 'zero' }
  const about = make('div', 'swf-about', box)
  about.textContent = scale.about || ''
}

// The widget

function render({ model, el }) {
  const root = make('div', 'swf', el), top = make('div', 'swf-legend', root), grid = make('div', 'swf-grid', root), empty = make('div', 'swf-empty', root)
  empty.textContent = 'No run is chosen: start one, load a file, or choose one in the menus.'
  let hover = null, fresh = null, waiting = 0, shown = null, sent = 0, rest = {}
  const cache = {}
  const run = side => { const raw = model.get(side); if (cache[side]?.raw !== raw) cache[side] = { raw, run: unpack(raw) }; return cache[side].run }
  const pinned = () => { const c = fresh ?? model.get('cursor'); return c && c.layer !== undefined ? c : null }
  const cursor = () => hover || pinned()

  const tell = () => {            // until the kernel hears of it, a pinned cursor is this view's own: an answer to an earlier one cannot undo it
    clearTimeout(sent)
    if (fresh) { model.set('cursor', fresh); model.save_changes() }
    fresh = null
  }
  const keep = c => {             // the kernel hears of it once the keys rest for a tenth of a second
    fresh = c || {}
    clearTimeout(sent)
    sent = setTimeout(tell, 100)
  }
  const spot = (p, e) => {
    const r = p.over.getBoundingClientRect(), x = e.clientX - r.left, y = e.clientY - r.top
    if (!p.run || !p.run.t.length || x < p.left || x > p.left + p.w + 2 || y < p.heat.top || y > p.height - BOTTOM) return null
    const i = p.row(y), step = Math.max(1, Math.min(p.span, (x - p.left) / p.w * p.span)), j = at(p.run.t, step)
    return { step: j < 0 ? Math.round(step) : p.run.t[j], layer: i >= 0 && i < p.run.sites.length ? p.run.sites[i] : (cursor() || shown).layer }
  }
  const move = {
    hover: (p, e) => {            // a browser also sends this when the page moves under a mouse that rests
      if (e.clientX === rest.x && e.clientY === rest.y) return
      rest = { x: e.clientX, y: e.clientY }
      hover = spot(p, e); mark()
    },
    leave: () => { hover = null; rest = {}; mark() },
    pin: (p, e) => { const c = spot(p, e), old = pinned(); if (!c) return; keep(old && old.step === c.step && old.layer === c.layer ? null : c); p.over.focus({ preventScroll: true }); draw() },
    key: (p, e) => {
      const r = p.run
      if (e.key === 'Escape') { if (!pinned()) return; hover = null; keep(null); draw(); e.preventDefault(); e.stopPropagation(); return }
      if (!r || !r.t.length || !['ArrowLeft', 'ArrowRight', 'ArrowUp', 'ArrowDown', 'Home', 'End', 'PageUp', 'PageDown'].includes(e.key)) return
      const now = cursor() || { step: r.t.at(-1), layer: r.sites[0] }
      let j = clampAt(r.t, now.step), i = Math.max(0, r.sites.indexOf(now.layer))
      const far = e.shiftKey ? 10 : 1, page = Math.max(1, Math.round(r.t.length / 10))
      if (e.key === 'ArrowLeft') j -= far; if (e.key === 'ArrowRight') j += far
      if (e.key === 'PageUp') j -= page; if (e.key === 'PageDown') j += page
      if (e.key === 'Home') j = 0; if (e.key === 'End') j = r.t.length - 1
      if (e.key === 'ArrowUp') i -= far; if (e.key === 'ArrowDown') i += far
      hover = null
      keep({ step: r.t[Math.max(0, Math.min(r.t.length - 1, j))], layer: r.sites[Math.max(0, Math.min(r.sites.length - 1, i))] })
      e.preventDefault(); e.stopPropagation()
      draw()
    },
  }
  const panels = Object.fromEntries(SIDES.map(s => [s, new Panel(s, grid, move)]))

  function mark() {
    const c = cursor()
    if (c && shown && c.layer !== shown.layer) { shown.layer = c.layer; return draw() }
    for (const s of SIDES) if (shown?.runs[s] && panels[s].run) panels[s].mark(c)
  }
  function curvesOf(runs) {
    const have = k => runs.some(r => r && r.array(k)?.length), loss = [...new Set(runs.flatMap(r => r ? r.losses : []))].filter(have), unit = runs.find(r => r)?.units || {}
    return [{ key: 'profile', names: [], unit: shown.scale.unit },
            ...(loss.length ? [{ key: 'loss', names: loss, unit: unit[loss[0]] || '' }] : []),
            ...(have('learning rate') ? [{ key: 'rate', names: ['learning rate'], unit: unit['learning rate'] || 'per step', thin: true, steps: true }] : [])]
  }
  function paint() {
    waiting = 0
    if (!root.isConnected || root.clientWidth < 60) return
    const runs = { left: run('left'), right: run('right') }, have = SIDES.filter(s => runs[s]), look = theme(root)
    root.classList.toggle('swf-dark', look.dark)
    root.dataset.runs = have.length
    empty.hidden = have.length > 0; top.hidden = grid.hidden = !have.length
    const lut = new Uint8Array(model.get('lut').buffer, model.get('lut').byteOffset, 768)
    const layers = have.flatMap(s => runs[s].sites), c = cursor()
    const layer = [c?.layer, shown?.layer, layers[0]].find(l => layers.includes(l)) || ''
    shown = { runs, scale: model.get('scale'), lut, span: Math.max(1, ...have.map(s => runs[s].span)), layer }
    if (!have.length) return
    legend(top, shown.scale, lut, look)
    const columns = have.length === 2 && root.clientWidth >= 760 ? 2 : 1
    grid.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`
    for (const s of SIDES) panels[s].box.hidden = !runs[s]
    const rows = Math.max(1, ...have.map(s => runs[s].sites.length)), curves = curvesOf([runs.left, runs.right])
    const g = panels.left.under.getContext('2d')
    g.font = `600 11px ${look.font}`
    const left = Math.ceil(Math.max(56, Math.min(132, 14 + Math.max(...have.flatMap(s => runs[s].labels.map(l => g.measureText(l).width))))))
    for (const s of have) if (panels[s].size(Math.floor(panels[s].box.clientWidth), left, rows, curves)) panels[s].draw(runs[s], shown, look)
    for (const s of have) if (panels[s].run) panels[s].mark(cursor())
    root.dataset.drawn = Number(root.dataset.drawn || 0) + 1
  }
  function draw() { if (!waiting) waiting = requestAnimationFrame(paint) }

  const names = ['left', 'right', 'scale', 'cursor'].map(n => 'change:' + n)
  for (const n of names) model.on(n, draw)
  const wide = new ResizeObserver(draw), dress = new MutationObserver(draw)
  wide.observe(root)
  dress.observe(document.body, { attributes: true, attributeFilter: ['data-jp-theme-light', 'data-jp-theme-name', 'class', 'style'] })
  draw()
  return () => {
    for (const n of names) model.off(n, draw)
    wide.disconnect(); dress.disconnect(); tell(); cancelAnimationFrame(waiting)
    for (const s of SIDES) for (const c of [panels[s].under, panels[s].over]) c.width = c.height = 0
  }
}

export default { render }
