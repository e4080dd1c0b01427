"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const D = JSON.parse($("data").textContent);
  // A thing is a call's place in `calls`, or -1 minus another event's place in `marks`.
  const calls = D.calls.map(([lane, row, begin, ready, entered, end, outcome, label, details, causes, holders]) =>
    ({ lane, row, begin, ready, entered, end, outcome, label, details, causes, holders, effects: [] }));
  const marks = D.marks.map(([lane, row, begin, name, details, causes]) =>
    ({ lane, row, begin, end: begin, name, details, causes, holders: [], effects: [], mark: true }));
  const thing = (n) => (n >= 0 ? calls[n] : marks[-1 - n]);
  const all = [...calls, ...marks];
  all.forEach((one) => {
    one.name = one.name || D.lanes[one.lane][0];
    one.bad = one.outcome === "failed" || one.name === "handler_failed";
    one.causes = one.causes.map(([n, time, until]) => ({ from: thing(n), to: one, time, until }));
    one.causes.forEach((link) => link.from.effects.push(link));
    one.holders = one.holders.map(thing);
  });
  const inOrder = [...all].sort((a, b) => a.begin - b.begin || a.lane - b.lane || a.row - b.row);
  const links = all.flatMap((one) => one.causes);
  const byRow = D.lanes.map(([, rows]) => Array.from({ length: rows }, () => []));
  inOrder.forEach((one) => byRow[one.lane][one.row].push(one));

  const ROW = 24, BAR = 18, PAD = 8, AXIS = 28;
  const plot = $("plot"), canvas = $("canvas"), pen = canvas.getContext("2d");
  const overview = $("overview"), tip = $("tip"), panel = $("panel");
  const lead = D.span * 0.015;
  let from = -lead, to = D.span + lead;
  let width = 0, height = 0, gutter = 0, ratio = 1, tops = [], bottom = 0;
  let colors = {}, hovered = null, selected = null, wanted = "", due = false, stripes = {}, small = null;

  const seconds = (s) => {
    const a = Math.abs(s);
    if (a < 0.0995) return `${+(s * 1000).toPrecision(a < 0.00995 ? 2 : 3)} ms`;
    if (a < 120) return `${+s.toPrecision(3)} s`;
    return a < 7200 ? `${+(s / 60).toPrecision(3)} min` : `${+(s / 3600).toPrecision(3)} h`;
  };
  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };

  // -- where things are ------------------------------------------------------------------------------
  const x = (time) => gutter + ((time - from) / (to - from)) * (width - gutter);
  const timeAt = (px) => from + ((px - gutter) / (width - gutter)) * (to - from);
  const y = (one) => tops[one.lane] + one.row * ROW - plot.scrollTop + AXIS;

  function layOut() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["card", "ink", "soft", "line", "band", "run", "run-ink", "wait", "after", "failed", "cancelled", "unfinished", "mark", "arrow", "focus"]) {
      colors[name] = style.getPropertyValue(`--${name}`).trim();
    }
    stripes = { wait: striped(colors.wait), after: striped(colors.after), unfinished: striped(colors.unfinished) };
    ratio = window.devicePixelRatio || 1;
    width = plot.clientWidth;
    gutter = width >= 640 ? 168 : 0;
    const head = gutter ? 0 : 20;
    bottom = 0;
    tops = D.lanes.map(([, rows]) => {
      const top = bottom + PAD + head;
      bottom = top + Math.max(rows * ROW, gutter && rows < 2 ? 34 : 0) + PAD;
      return top;
    });
    const content = bottom + AXIS;
    const most = Math.max(300, window.innerHeight * 0.76);
    height = Math.min(content, most);
    plot.style.height = `${height + 2}px`;
    $("spacer").style.height = `${content - height}px`;
    size(canvas, width, height);
    small = null;
    drawLegend();
    draw();
  }
  function size(one, w, h) {
    one.width = Math.round(w * ratio);
    one.height = Math.round(h * ratio);
    one.style.height = `${h}px`;
    one.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
  }
  function striped(color) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 6;
    const ink = tile.getContext("2d");
    ink.globalAlpha = 0.35;
    ink.fillStyle = color;
    ink.fillRect(0, 0, 6, 6);
    ink.globalAlpha = 1;
    ink.strokeStyle = color;
    ink.lineWidth = 2;
    for (const d of [-6, 0, 6]) {
      ink.beginPath(); ink.moveTo(d - 1, 7); ink.lineTo(d + 7, -1); ink.stroke();
    }
    return pen.createPattern(tile, "repeat");
  }

  // -- drawing -----------------------------------------------------------------------------------------
  function draw() {
    if (due) return;
    due = true;
    requestAnimationFrame(() => { due = false; paint(); });
  }
  function clip(text, most) {
    if (most < 14) return "";
    if (pen.measureText(text).width <= most) return text;
    let low = 0, high = text.length;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (pen.measureText(text.slice(0, middle) + "…").width <= most) low = middle; else high = middle - 1;
    }
    return low ? text.slice(0, low) + "…" : "";
  }
  const font = (px, weight = "") => `${weight} ${px}px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif`;

  function paint() {
    plot.dataset.from = from;
    plot.dataset.to = to;
    pen.clearRect(0, 0, width, height);
    const scroll = plot.scrollTop;
    D.lanes.forEach(([,], lane) => {
      const top = (lane ? laneBottom(lane - 1) : 0) - scroll + AXIS;
      if (lane % 2) { pen.fillStyle = colors.band; pen.fillRect(0, top, width, laneBottom(lane) - scroll + AXIS - top); }
    });
    const ticks = paintTicks();
    pen.save();
    pen.beginPath(); pen.rect(gutter, AXIS, width - gutter, height - AXIS); pen.clip();
    byRow.forEach((rows, lane) => rows.forEach((things, row) => {
      const top = tops[lane] + row * ROW - scroll + AXIS;
      if (top > height || top + ROW < AXIS) return;
      for (let n = first(things, from); n < things.length && things[n].begin <= to; n++) paintThing(things[n], top, things[n - 1], things[n + 1]);
    }));
    const shown = hovered || selected;
    const near = links.length < 4000 ? links.filter((link) => isSeen(link.from) || isSeen(link.to)) : [];
    if (near.length <= 80) near.forEach((link) => paintLink(link, colors.arrow, 0.55));
    if (shown) {
      [...shown.causes, ...shown.effects].slice(0, 200).forEach((link) => paintLink(link, colors.focus, 1));
      shown.holders.forEach((holder) => paintHolder(shown, holder));
      outline(shown);
    }
    if (selected && selected !== shown) outline(selected);
    pen.restore();
    paintLabels(scroll);
    paintAxis(ticks);
    paintOverview();
  }
  const laneBottom = (lane) => (lane + 1 < tops.length ? tops[lane + 1] - PAD - (gutter ? 0 : 20) : bottom);
  const isSeen = (one) => one.end >= from && one.begin <= to && y(one) > AXIS - ROW && y(one) < height;
  function first(things, time) { // rows hold calls that don't overlap, and marks that have no length
    let low = 0, high = things.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (things[middle].begin < time) low = middle + 1; else high = middle;
    }
    while (low > 0 && (things[low - 1].mark || things[low - 1].end >= time)) low--;
    return low;
  }
  function box(a, b, top, h, fill) {
    const left = Math.max(x(a), gutter - 4), right = Math.min(Math.max(x(b), x(a) + 1), width + 4);
    if (right <= left) return;
    pen.fillStyle = fill;
    pen.fillRect(left, top, right - left, h);
  }
  function paintThing(one, top, previous, following) {
    pen.globalAlpha = wanted && !isWanted(one) ? 0.14 : 1;
    const bar = top + (ROW - BAR) / 2;
    if (one.mark) {
      const cx = x(one.begin), cy = top + ROW / 2, r = 5;
      pen.fillStyle = one.bad ? colors.failed : colors.mark;
      pen.strokeStyle = colors.card;
      pen.lineWidth = 1.5;
      pen.beginPath(); pen.moveTo(cx, cy - r); pen.lineTo(cx + r, cy); pen.lineTo(cx, cy + r); pen.lineTo(cx - r, cy); pen.closePath();
      pen.fill(); pen.stroke();
      if (!laneCounts[one.lane].calls) paintName(one, cx, cy, previous, following);
      pen.globalAlpha = 1;
      return;
    }
    if (one.outcome === "unfinished") box(one.begin, one.end, bar, BAR, stripes.unfinished);
    else {
      if (one.ready > one.begin) box(one.begin, one.ready, bar + 4, BAR - 8, stripes.after);
      if (one.entered > one.ready) box(one.ready, one.entered, bar + 2, BAR - 4, stripes.wait);
      const fill = one.outcome === "failed" ? colors.failed : one.outcome === "cancelled" ? colors.cancelled : colors.run;
      box(one.entered, one.end, bar, BAR, fill);
      if (one.outcome !== "complete" && x(one.end) - x(one.entered) < 3) {
        pen.fillStyle = fill; pen.fillRect(x(one.end) - 2, bar - 1, 4, BAR + 2);
      }
    }
    const left = Math.max(x(one.outcome === "unfinished" ? one.begin : one.entered), gutter), right = Math.min(x(one.end), width);
    const sign = one.outcome === "failed" ? "✕ " : one.outcome === "cancelled" ? "⊘ " : "";
    if (right - left > 16) {
      pen.font = font(11.5);
      pen.textBaseline = "middle";
      pen.fillStyle = one.outcome === "unfinished" ? colors.ink : colors["run-ink"];
      pen.fillText(clip(sign + one.label, right - left - 8), left + 4, top + ROW / 2 + 0.5);
    }
    pen.globalAlpha = 1;
  }
  function paintName(one, cx, cy, previous, following) { // beside it, where there is room
    const right = (following ? (x(following.begin) - cx) / 2 : width - cx) - 14; // a gap is shared by both its ends
    const left = (previous ? (cx - x(previous.begin)) / 2 : cx - gutter) - 14;
    pen.font = font(11.5);
    pen.textBaseline = "middle";
    pen.fillStyle = one.bad ? colors.failed : colors.ink;
    const words = one.bad && one.details.length ? one.details.map((d) => d[1])[one.details.length - 1] : one.name;
    const length = pen.measureText(words).width, after = right >= Math.min(length, 90) || right >= left;
    const shown = clip(words, after ? right : left);
    pen.fillText(shown, after ? cx + 9 : cx - 9 - pen.measureText(shown).width, cy);
  }
  function outline(one) {
    const top = y(one);
    pen.strokeStyle = colors.focus;
    pen.lineWidth = 2;
    if (one.mark) { pen.beginPath(); pen.arc(x(one.begin), top + ROW / 2, 8, 0, 7); pen.stroke(); return; }
    const left = Math.max(x(one.begin), gutter - 6);
    pen.strokeRect(left - 1, top + 2, Math.max(Math.min(x(one.end), width + 6) - left, 2) + 2, ROW - 4);
  }
  function paintLink({ from: source, to: target, time, until }, color, alpha) {
    const x1 = x(time), y1 = y(source) + ROW / 2, x2 = x(until), y2 = y(target) + ROW / 2;
    if (Math.max(x1, x2) < gutter || Math.min(x1, x2) > width || y1 === y2) return;
    const bend = Math.max(14, Math.min(Math.abs(x2 - x1) / 2, 70));
    pen.save();
    pen.globalAlpha = alpha;
    pen.strokeStyle = pen.fillStyle = color;
    pen.lineWidth = alpha === 1 ? 2 : 1.25;
    pen.beginPath(); pen.moveTo(x1, y1); pen.bezierCurveTo(x1 + bend, y1, x2 - bend, y2, x2 - 3, y2); pen.stroke();
    pen.beginPath(); pen.moveTo(x2, y2); pen.lineTo(x2 - 7, y2 - 4); pen.lineTo(x2 - 7, y2 + 4); pen.fill();
    pen.restore();
  }
  function paintHolder(waiter, holder) {
    const at = Math.max(waiter.ready, Math.min(waiter.entered, (Math.max(waiter.ready, holder.entered) + Math.min(waiter.entered, holder.end)) / 2));
    pen.save();
    pen.strokeStyle = colors.wait;
    pen.lineWidth = 2;
    pen.setLineDash([4, 3]);
    pen.beginPath(); pen.moveTo(x(at), y(waiter) + ROW / 2); pen.lineTo(x(at), y(holder) + ROW / 2); pen.stroke();
    pen.setLineDash([]);
    pen.strokeRect(x(holder.entered), y(holder) + 2, Math.max(x(holder.end) - x(holder.entered), 2), ROW - 4);
    pen.restore();
  }
  function paintTicks() {
    const least = 90 / (width - gutter) * (to - from);
    const power = 10 ** Math.floor(Math.log10(least));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least);
    const found = [];
    for (let n = Math.ceil(from / step); n * step <= to; n++) {
      if (n < 0) continue;
      found.push(n * step);
      pen.fillStyle = colors.line;
      pen.fillRect(Math.round(x(n * step)), AXIS, 1, height);
    }
    return { at: found, step };
  }
  function paintAxis({ at, step }) {
    pen.fillStyle = colors.card;
    pen.fillRect(0, 0, width, AXIS);
    pen.fillStyle = colors.line;
    pen.fillRect(0, AXIS - 1, width, 1);
    pen.fillStyle = colors.soft;
    pen.font = font(12);
    pen.textBaseline = "middle";
    const [unit, by] = step < 1e-3 ? ["µs", 1e6] : step < 1 && to < 10 ? ["ms", 1e3] : step < 60 ? ["s", 1] : step < 3600 ? ["min", 1 / 60] : ["h", 1 / 3600];
    at.forEach((time) => {
      const text = `${+(time * by).toFixed(3)} ${unit}`, px = x(time);
      if (px >= gutter - 1 && px + pen.measureText(text).width + 6 < width) pen.fillText(text, px + 5, AXIS / 2);
    });
  }
  function paintLabels(scroll) {
    D.lanes.forEach(([name], lane) => {
      const top = tops[lane] - scroll + AXIS, end = laneBottom(lane) - scroll + AXIS;
      if (end < AXIS || top - 24 > height) return;
      const mine = laneCounts[lane];
      pen.textBaseline = "middle";
      if (gutter) {
        pen.fillStyle = lane % 2 ? colors.band : colors.card;
        pen.fillRect(0, Math.max(top - PAD, AXIS), gutter, end - top + PAD);
        const base = Math.max(top, Math.min(AXIS + 6, end - 44));
        pen.fillStyle = colors.ink; pen.font = font(14, "600");
        pen.fillText(clip(name, gutter - 24), 14, base + 10);
        pen.font = font(11.5); pen.fillStyle = mine.bad ? colors.failed : colors.soft;
        pen.fillText(clip(mine.text, gutter - 24), 14, base + 27);
        pen.fillStyle = colors.line; pen.fillRect(gutter - 1, Math.max(top - PAD, AXIS), 1, end - top + PAD);
      } else {
        pen.font = font(13, "600"); pen.fillStyle = colors.ink;
        const text = clip(name, width * 0.55);
        pen.fillText(text, 8, top - 11);
        const used = pen.measureText(text).width;
        pen.font = font(11.5); pen.fillStyle = mine.bad ? colors.failed : colors.soft;
        pen.fillText(clip(mine.text, width - used - 30), 16 + used, top - 11);
      }
      pen.fillStyle = colors.line;
      pen.fillRect(0, end - 1, width, 1);
    });
  }
  const laneCounts = D.lanes.map((_, lane) => {
    const mine = byRow[lane].flat().filter((one) => !one.mark), events = byRow[lane].flat().length - mine.length;
    const bad = mine.filter((one) => one.outcome === "failed").length;
    const parts = mine.length ? [`${mine.length} call${mine.length > 1 ? "s" : ""}`] : [`${events} event${events > 1 ? "s" : ""}`];
    if (bad) parts.push(`${bad} failed`);
    return { text: parts.join(" · "), bad, calls: mine.length };
  });
  function paintOverview() {
    const w = overview.clientWidth, h = 34, ink = overview.getContext("2d");
    if (!small) { // drawn once for each size and colour scheme
      size(overview, w, h);
      small = document.createElement("canvas");
      size(small, w, h);
      const s = small.getContext("2d"), rows = D.lanes.reduce((sum, [, n]) => sum + n, 0) || 1;
      const step = (h - 8) / rows;
      let above = 0;
      byRow.forEach((lane) => lane.forEach((things) => {
        for (const pass of [false, true]) for (const one of things) {
          if (Boolean(one.bad) !== pass) continue;
          s.fillStyle = one.bad ? colors.failed : one.mark ? colors.mark : colors.run;
          s.globalAlpha = one.bad ? 1 : 0.6;
          s.fillRect(one.begin / D.span * w, 4 + above * step, Math.max((one.end - one.begin) / D.span * w, 1.5), Math.max(step * 0.8, one.bad ? 2 : 1));
        }
        above++;
      }));
    }
    ink.clearRect(0, 0, w, h);
    ink.drawImage(small, 0, 0, w, h);
    const left = from / D.span * w, right = to / D.span * w;
    if (to - from < D.span * 0.995) {
      ink.fillStyle = colors.soft; ink.globalAlpha = 0.22;
      ink.fillRect(0, 0, left, h); ink.fillRect(right, 0, w, h);
      ink.globalAlpha = 1; ink.strokeStyle = colors.focus; ink.lineWidth = 2;
      ink.strokeRect(left, 1, Math.max(right - left, 3), h - 2);
    }
  }

  // -- words ---------------------------------------------------------------------------------------------
  function tell(into, one) {
    into.replaceChildren();
    into.append(element("div", one.mark ? one.name : one.label ? `${one.name}(${one.label})` : one.name, "what"));
    const parts = [];
    if (one.mark) parts.push(`at ${seconds(one.begin)}`);
    else {
      parts.push({ complete: "completed", failed: "failed", cancelled: "cancelled", unfinished: "has not ended" }[one.outcome]);
      if (one.ready - one.begin >= 0.001) parts.push(`came after others for ${seconds(one.ready - one.begin)}`);
      if (one.entered - one.ready >= 0.001) parts.push(`waited ${seconds(one.entered - one.ready)}`);
      if (one.outcome !== "unfinished") parts.push(`ran ${seconds(one.end - one.entered)}`);
      parts.push(`began at ${seconds(one.begin)}`);
    }
    into.append(element("div", parts.join(" · "), "how"));
    const list = element("dl");
    one.details.forEach(([key, value]) => list.append(element("dt", key), element("dd", value, key === "error" ? "failed" : "")));
    if (one.holders.length) {
      const who = one.holders.map((holder) => `${holder.name}(${holder.label})`).join(", ");
      list.append(element("dt", "waited for"), element("dd", who));
    }
    const causes = [...new Set(one.causes.map((link) => link.from))].map((c) => (c.label ? `${c.name}(${c.label})` : c.name));
    if (causes.length) list.append(element("dt", "because of"), element("dd", causes.join(", ")));
    into.append(list);
  }
  function hay(one) {
    if (one.hay === undefined) one.hay = [one.name, one.label, one.outcome, ...one.details.map((d) => d[1])].join("\n").toLowerCase();
    return one.hay;
  }
  const isWanted = (one) => hay(one).includes(wanted);

  function drawLegend() {
    const kinds = [["complete", "running"], ["wait", "waiting for a lock"], ["after", "waiting for other agents"], ["failed", "failed"], ["cancelled", "cancelled"], ["unfinished", "not ended"], ["mark", "other event"]];
    const there = new Set(all.map((one) => (one.mark ? "mark" : one.outcome)));
    if (calls.some((one) => one.entered - one.ready > 0)) there.add("wait");
    if (calls.some((one) => one.ready - one.begin > 0)) there.add("after");
    $("legend").replaceChildren(...kinds.filter(([kind]) => there.has(kind)).map(([kind, words]) => {
      const item = element("li"), sample = element("canvas");
      sample.width = 22 * ratio; sample.height = 12 * ratio;
      const ink = sample.getContext("2d");
      ink.scale(ratio, ratio);
      ink.fillStyle = kind === "complete" ? colors.run : kind === "mark" ? colors.mark : stripes[kind] || colors[kind];
      if (kind === "mark") { ink.translate(11, 6); ink.rotate(Math.PI / 4); ink.fillRect(-4, -4, 8, 8); } else ink.fillRect(0, 0, 22, 12);
      item.append(sample, words);
      return item;
    }));
  }

  // -- moving ------------------------------------------------------------------------------------------
  function show(a, b) {
    const most = D.span + 2 * lead, length = Math.min(Math.max(b - a, 1e-5), most);
    const start = Math.min(Math.max((a + b - length) / 2, -lead - length * 0.4), D.span + lead - length * 0.6);
    from = length === most ? -lead : start;
    to = from + length;
    draw();
  }
  function zoom(factor, px) { // around the pointer, else around what is selected and seen, else around the middle
    const middle = selected ? (Math.max(selected.begin, from) + Math.min(selected.end, to)) / 2 : NaN;
    const time = px !== undefined ? timeAt(px) : middle >= from && middle <= to ? middle : (from + to) / 2;
    show(time - (time - from) * factor, time + (to - time) * factor);
  }
  const pan = (part) => show(from + (to - from) * part, to + (to - from) * part);
  const fit = () => show(-lead, D.span + lead);
  function select(one) {
    selected = one;
    panel.hidden = !one;
    if (one) {
      tell(panel, one);
      if (one.begin < from || one.begin > to) { const half = (to - from) / 2; show(one.begin - half, one.begin + half); }
      const top = tops[one.lane] + one.row * ROW;
      if (top < plot.scrollTop) plot.scrollTop = top - PAD;
      if (top + ROW + AXIS > plot.scrollTop + height) plot.scrollTop = top + ROW + AXIS + PAD - height;
    }
    draw();
  }
  function next(step, fits = () => true) {
    const things = inOrder.filter((one) => fits(one) && (!wanted || isWanted(one)));
    if (!things.length) return;
    const place = things.indexOf(selected);
    select(things[place < 0 ? (step > 0 ? 0 : things.length - 1) : (place + step + things.length) % things.length]);
  }
  function thingAt(px, py) {
    if (py < AXIS || px < gutter) return null;
    let best = null, distance = 7;
    byRow.forEach((rows, lane) => {
      const row = Math.floor((py + plot.scrollTop - AXIS - tops[lane]) / ROW);
      if (row < 0 || row >= rows.length) return;
      const things = rows[row], reach = 7 / (width - gutter) * (to - from), time = timeAt(px);
      for (let n = first(things, time - reach); n < things.length && things[n].begin <= time + reach; n++) {
        const one = things[n], away = Math.max(x(one.begin) - px, px - x(one.end), 0) - (one.mark ? 1 : 0);
        if (away < distance || (away === distance && one.mark)) { best = one; distance = away; }
      }
    });
    return best;
  }

  // -- hands -------------------------------------------------------------------------------------------
  const fingers = new Map();
  let moved = 0, spread = 0;
  const at = (event) => { const r = canvas.getBoundingClientRect(); return [event.clientX - r.left, event.clientY - r.top]; };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, at(event));
    moved = spread = 0;
    plot.focus({ preventScroll: true });
  });
  canvas.addEventListener("pointermove", (event) => {
    const [px, py] = at(event), before = fingers.get(event.pointerId);
    if (before) {
      fingers.set(event.pointerId, [px, py]);
      const others = [...fingers.values()];
      if (others.length > 1) {
        const now = Math.hypot(others[0][0] - others[1][0], others[0][1] - others[1][1]);
        if (spread) zoom(spread / Math.max(now, 1), (others[0][0] + others[1][0]) / 2);
        spread = now;
        moved = 9;
        return;
      }
      moved += Math.abs(px - before[0]) + Math.abs(py - before[1]);
      if (moved > 4) {
        plot.classList.add("dragging");
        tip.hidden = true;
        const by = (before[0] - px) / (width - gutter) * (to - from);
        show(from + by, to + by);
        if (event.pointerType === "mouse") plot.scrollTop += before[1] - py;
      }
      return;
    }
    hover(thingAt(px, py), event);
  });
  function hover(one, event) {
    if (one !== hovered) { hovered = one; draw(); if (one) tell(tip, one); }
    plot.classList.toggle("over", Boolean(one));
    tip.hidden = !one;
    if (!one) return;
    const w = tip.offsetWidth, h = tip.offsetHeight;
    const left = Math.max(10, Math.min(event.clientX + 14, window.innerWidth - w - 10));
    const top = event.clientY + 18 + h > window.innerHeight ? Math.max(8, event.clientY - h - 12) : event.clientY + 18;
    tip.style.transform = `translate(${left}px, ${top}px)`;
  }
  const release = (event) => {
    if (!fingers.delete(event.pointerId)) return;
    plot.classList.remove("dragging");
    spread = 0;
    if (event.type === "pointerup" && moved <= 4) select(thingAt(...at(event)));
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", (event) => { if (!fingers.size) hover(null, event); });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const unit = event.deltaMode ? 16 : 1;
    const sideways = event.shiftKey ? event.deltaY || event.deltaX : Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : 0;
    if (sideways) pan(sideways * unit / (width - gutter));
    else zoom(Math.exp(Math.max(-120, Math.min(event.deltaY * unit, 120)) * 0.003), at(event)[0]);
  }, { passive: false });
  canvas.addEventListener("dblclick", (event) => zoom(0.4, at(event)[0]));
  const jump = (event) => {
    if (!event.buttons) return;
    const r = overview.getBoundingClientRect(), time = (event.clientX - r.left) / r.width * D.span, half = (to - from) / 2;
    show(time - half, time + half);
  };
  overview.addEventListener("pointerdown", (event) => { overview.setPointerCapture(event.pointerId); jump(event); });
  overview.addEventListener("pointermove", jump);
  plot.addEventListener("scroll", draw);
  const keys = {
    ArrowLeft: () => pan(-0.15), ArrowRight: () => pan(0.15), ArrowUp: () => { plot.scrollTop -= 2 * ROW; }, ArrowDown: () => { plot.scrollTop += 2 * ROW; },
    "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1 / 0.6), 0: fit, Home: fit,
    n: () => next(1), p: () => next(-1), f: () => next(1, (one) => one.bad), Escape: () => select(null),
  };
  plot.addEventListener("keydown", (event) => {
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  $("in").addEventListener("click", () => zoom(0.6));
  $("out").addEventListener("click", () => zoom(1 / 0.6));
  $("fit").addEventListener("click", fit);
  $("failure").addEventListener("click", () => next(1, (one) => one.bad));
  $("find").addEventListener("input", () => {
    wanted = $("find").value.trim().toLowerCase();
    $("found").textContent = wanted ? `${all.filter(isWanted).length} found` : "";
    draw();
  });
  $("find").addEventListener("keydown", (event) => {
    if (event.key === "Enter") next(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") { $("find").value = ""; $("find").dispatchEvent(new Event("input")); }
  });

  $("failure").hidden = !all.some((one) => one.bad);
  $("when").textContent = all.length ? `${new Date(D.began * 1000).toLocaleString()} · ${seconds(D.span)}` : "No events.";
  D.story.forEach((line) => $("story").append(element("li", line)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", layOut);
  window.addEventListener("resize", layOut);
  layOut();
})();
