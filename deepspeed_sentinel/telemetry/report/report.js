"use strict";
(function () {
  const { heat, loss, names, states } = JSON.parse(document.getElementById("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const levels = bytes(heat.levels), out = bytes(heat.out), rows = heat.stages * heat.replicas;
  const canvas = document.getElementById("map"), tip = document.getElementById("tip"), box = document.getElementById("heat");
  // Three runs of the demo get the colours that its own pictures have.
  const runs = loss.map((one) => one[0]), inks = runs.length > 1 ? ["#1b6e3c", "#b3261e", "#2563c9", "#9a5b00", "#7b3294", "#5b6470"] : ["#2563c9"];
  const state = new Map(states), told = new Set(states.map((one) => one[0]));
  let low = heat.first, high = heat.last + 1, only = rows > 48 && told.size > 0, layout = null;

  // Blue inside the fence, white on it, red outside; 0 is nothing judged.
  const ramp = (stops) => (at) => {
    const place = Math.min(0.9999, Math.max(0, at)) * (stops.length - 1), left = Math.floor(place), part = place - left;
    return stops[left].map((value, index) => Math.round(value + part * (stops[left + 1][index] - value)));
  };
  const inside = ramp([[33, 102, 172], [103, 169, 207], [209, 229, 240], [244, 244, 244]]);
  const outside = ramp([[253, 219, 199], [239, 138, 98], [203, 60, 60], [160, 20, 40]]);
  const colours = Array.from({ length: 256 }, (_, level) => {
    const rgb = level === 0 ? [201, 205, 210] : level <= 128 ? inside((level - 20) / 108) : outside((level - 129) / 100);
    return `rgb(${rgb})`;
  });

  function shownRows() {
    const every = Array.from({ length: rows }, (_, row) => row);
    return only ? every.filter((row) => told.has(row)) : every;
  }

  function draw() {
    const width = box.clientWidth, narrow = width < 560, shown = shownRows();
    const label = narrow ? 58 : 150, plot = width - label - 8, top = 18;
    const height = Math.max(9, Math.min(22, Math.floor(620 / Math.max(1, shown.length))));
    const thin = Math.max(6, Math.min(12, Math.floor(120 / heat.replicas)));
    const outTop = top + shown.length * height + 8 + 4 * (only ? 0 : heat.stages - 1);
    const lossTop = outTop + thin * heat.replicas + 24, lossHeight = runs.length ? 110 : 0;
    const total = lossTop + (lossHeight ? lossHeight + 20 : 0);
    const ratio = Math.max(2, window.devicePixelRatio || 1);
    canvas.width = width * ratio;
    canvas.height = total * ratio;
    canvas.style.height = total + "px";
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, width, total);
    const x = (step) => label + ((step - low) / (high - low)) * plot;
    const top_of = new Map();
    let y = top;
    shown.forEach((row, index) => {
      if (!only && index && row % heat.replicas === 0) y += 4;
      top_of.set(row, y);
      y += height;
    });
    layout = { x, label, plot, shown, height, top_of, outTop, thin, narrow };
    const firstCell = Math.max(0, Math.floor((low - heat.first) / heat.width));
    const lastCell = Math.min(heat.cells, Math.ceil((high - heat.first) / heat.width));
    const stride = Math.max(1, Math.floor((lastCell - firstCell) / (plot * ratio)));  // never thinner than a dot

    function strip(data, row, at, size, colour) {
      for (let cell = firstCell; cell < lastCell; cell += stride) {
        let worst = 0;
        for (let one = cell; one < Math.min(cell + stride, lastCell); one++) worst = Math.max(worst, data[row * heat.cells + one]);
        const from = Math.max(label, x(heat.first + cell * heat.width));
        const to = Math.min(label + plot, x(heat.first + (cell + stride) * heat.width));
        pen.fillStyle = colour(worst);
        pen.fillRect(from, at, Math.max(to - from, 0) + 0.3, size - (size > 8 ? 1 : 0.3));
      }
    }
    pen.font = (narrow ? 10 : 11) + "px system-ui, DejaVu Sans, sans-serif";
    pen.textBaseline = "middle";
    shown.forEach((row) => {
      const at = top_of.get(row), stage = Math.floor(row / heat.replicas), replica = row % heat.replicas;
      strip(levels, row, at, height, (level) => colours[level]);
      const grave = ["convicted", "proved"].includes(state.get(row));
      pen.fillStyle = grave ? "#b3261e" : told.has(row) ? "#1c2024" : "#5b6470";
      pen.font = (grave ? "bold " : "") + (narrow ? 10 : 11) + "px system-ui, DejaVu Sans, sans-serif";
      pen.textAlign = "right";
      pen.fillText(narrow ? `s${stage} r${replica}` : `stage ${stage}, replica ${replica}`, label - 6, at + height / 2);
    });
    pen.save();
    pen.beginPath();
    pen.rect(label, 0, plot, total);
    pen.clip();
    if (heat.warm !== null) {
      pen.strokeStyle = "#555";
      pen.setLineDash([3, 3]);
      pen.beginPath(); pen.moveTo(x(heat.warm + 1), top); pen.lineTo(x(heat.warm + 1), outTop - 6); pen.stroke();
      pen.setLineDash([]);
      pen.fillStyle = "#555"; pen.textAlign = "right";
      pen.fillText("warm-up", x(heat.warm + 1) - 3, 9);
    }
    const step = plot / (high - low), radius = Math.max(1.4, Math.min(3.5, step / 3, height / 3));
    if (step > 2) heat.twins.forEach((twin) => {
      pen.fillStyle = "rgba(40, 40, 40, .35)";
      pen.fillRect(x(twin), top - 5, step, 4);
    });
    const order = { alarm: 0, suspicion: 0, proof: 1, conviction: 2, release: 2 };
    [...heat.marks].sort((a, b) => order[a[0]] - order[b[0]]).forEach(([kind, row, at]) => {
      if (!top_of.has(row) || at < low || at >= high || kind === "suspicion" || kind === "proof") return;
      const px = x(at + 0.5), py = top_of.get(row) + (height - 1) / 2;
      if (kind === "alarm") {
        pen.fillStyle = "#111";
        pen.beginPath(); pen.arc(px, py, radius, 0, 7); pen.fill();
      } else {
        pen.font = `bold ${Math.min(20, height + 5)}px system-ui, DejaVu Sans, sans-serif`;
        pen.textAlign = "center";
        pen.lineWidth = 3.5; pen.strokeStyle = "#111"; pen.strokeText(kind === "conviction" ? "★" : "☆", px, py);
        pen.fillStyle = "#ffd400"; pen.fillText(kind === "conviction" ? "★" : "☆", px, py);
        pen.lineWidth = 1;
      }
    });
    pen.restore();
    pen.font = (narrow ? 10 : 11) + "px system-ui, DejaVu Sans, sans-serif";
    for (let column = 0; column < heat.replicas; column++) {
      const at = outTop + column * thin;
      strip(out, column, at, thin, (one) => (one ? "#7b3294" : "#ececf1"));
    }
    pen.fillStyle = "#5b6470"; pen.textAlign = "right";
    pen.fillText(narrow ? "columns" : `columns 0 to ${heat.replicas - 1}`, label - 6, outTop + (thin * heat.replicas) / 2);
    axis(pen, x, outTop + thin * heat.replicas + 10, label, plot, narrow);
    if (lossHeight) curve(pen, x, lossTop, lossHeight, label, plot);
    const seen = heat.width > 1 ? `, ${heat.width} steps a cell` : "";
    document.getElementById("range").textContent = `steps ${Math.round(low)} to ${Math.round(high) - 1}${seen}`;
    document.getElementById("rows").textContent = only ? `all ${rows} workers` : "only workers with something";
    document.getElementById("rows").style.display = told.size && told.size < rows ? "" : "none";
  }

  function axis(pen, x, y, label, plot, narrow) {
    const rough = (high - low) / (narrow ? 4 : 10), power = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
    const unit = Math.max(1, [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough));
    pen.textAlign = "center"; pen.fillStyle = "#5b6470";
    for (let at = Math.ceil(low / unit) * unit; at < high; at += unit) {
      const px = x(at + 0.5);
      if (px > label + 4 && px < label + plot - 4) pen.fillText(String(at), px, y);
    }
    pen.textAlign = "right";
    pen.fillText("step", label - 6, y);
  }

  function curve(pen, x, top, height, label, plot) {
    const seen = loss.map((one) => one[1].filter(([step]) => step >= low && step < high));
    const values = seen.flat().map((one) => one[1]).sort((a, b) => a - b);
    if (!values.length) return;
    const least = values[0], most = values[Math.floor(0.99 * (values.length - 1))], span = most - least || 1;
    const y = (value) => top + 6 + (1 - Math.min(1, (value - least) / span)) * (height - 12);
    pen.strokeStyle = "#d9dee5"; pen.lineWidth = 1;
    pen.strokeRect(label, top, plot, height);
    seen.forEach((pairs, run) => {
      pen.strokeStyle = inks[run]; pen.lineWidth = 1.8;
      pen.beginPath();
      pairs.forEach(([step, value], index) => pen[index ? "lineTo" : "moveTo"](x(step + 0.5), y(value)));
      pen.stroke();
    });
    pen.fillStyle = "#5b6470"; pen.textAlign = "right";
    pen.fillText(most.toPrecision(3), label - 6, y(most)); pen.fillText(least.toPrecision(3), label - 6, y(least));
    pen.fillText("loss", label - 6, top + height / 2);
  }

  function cellAt(px, py) {
    const step = Math.floor(low + ((px - layout.label) / layout.plot) * (high - low));
    if (step < heat.first || step > heat.last || px < layout.label) return null;
    const row = layout.shown.find((one) => py >= layout.top_of.get(one) && py < layout.top_of.get(one) + layout.height);
    const column = Math.floor((py - layout.outTop) / layout.thin);
    if (row !== undefined) return { step, row };
    return column >= 0 && column < heat.replicas ? { step, column } : null;
  }

  function tellOf(found) {
    const cell = Math.floor((found.step - heat.first) / heat.width);
    const from = heat.first + cell * heat.width, to = Math.min(heat.last, from + heat.width - 1);
    const when = to > from ? `steps ${from} to ${to}` : `step ${from}`;
    if (found.column !== undefined) {
      return `${when}\ncolumn ${found.column}: ${out[found.column * heat.cells + cell] ? "left out of the weights" : "counted"}`;
    }
    const level = levels[found.row * heat.cells + cell], replica = found.row % heat.replicas;
    const score = level ? (10 ** ((level - 128) / 63.5)).toPrecision(2) + (level === 255 ? " or more" : "") : "nothing judged or recorded";
    const marks = heat.marks.filter((one) => one[1] === found.row && one[2] >= from && one[2] <= to).map((one) => one[0]);
    const name = names[found.row] || `stage ${Math.floor(found.row / heat.replicas)}, replica ${replica}`;
    const twin = heat.twins.some((one) => one >= from && one <= to) ? "\ntwin step" : "";
    const moved = heat.moves.filter((one) => one[0] === found.row && one[1] <= to).pop();
    return `${name}\n${when}\nscore ${score}${marks.length ? "\n" + [...new Set(marks)].join(", ") : ""}${twin}\nserves column ${moved ? moved[2] : replica}`;
  }

  function hover(event) {
    const place = canvas.getBoundingClientRect(), px = event.clientX - place.left, py = event.clientY - place.top;
    const found = cellAt(px, py);
    tip.style.display = found ? "block" : "none";
    if (!found) return;
    tip.textContent = tellOf(found);
    tip.style.left = Math.max(0, Math.min(px + 14, place.width - tip.offsetWidth - 2)) + "px";
    tip.style.top = py + 18 + "px";
  }

  function show(from, to) {
    const span = Math.max(Math.min(to - from, heat.last + 1 - heat.first), Math.min(8, heat.last + 1 - heat.first));
    low = Math.max(heat.first, Math.min(from, heat.last + 1 - span));
    high = low + span;
    draw();
  }
  function zoom(factor, at) {
    const centre = at === undefined ? (low + high) / 2 : at, span = (high - low) * factor;
    show(centre - ((centre - low) / (high - low)) * span, centre + ((high - centre) / (high - low)) * span);
  }
  const stepOf = (event) => low + ((event.clientX - canvas.getBoundingClientRect().left - layout.label) / layout.plot) * (high - low);
  const press = (id, act) => document.getElementById(id).addEventListener("click", act);
  press("in", () => zoom(0.5));
  press("out", () => zoom(2));
  press("left", () => show(low - (high - low) / 2, high - (high - low) / 2));
  press("right", () => show(low + (high - low) / 2, high + (high - low) / 2));
  press("all", () => show(heat.first, heat.last + 1));
  press("rows", () => { only = !only; draw(); });
  canvas.addEventListener("dblclick", (event) => zoom(0.5, stepOf(event)));
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, stepOf(event));
  }, { passive: false });
  let dragged = null;
  canvas.addEventListener("pointerdown", (event) => { dragged = { at: event.clientX, low, high }; hover(event); });
  canvas.addEventListener("pointermove", (event) => {
    if (dragged && event.buttons && Math.abs(event.clientX - dragged.at) > 4) {
      const moved = ((event.clientX - dragged.at) / layout.plot) * (dragged.high - dragged.low);
      tip.style.display = "none";
      show(dragged.low - moved, dragged.high - moved);
    } else hover(event);
  });
  canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; dragged = null; });
  window.addEventListener("pointerup", () => { dragged = null; });
  window.addEventListener("resize", draw);
  if (runs.length > 1) runs.forEach((run, index) => {
    const key = document.createElement("span"), mark = document.createElement("i");
    mark.style.background = inks[index];
    key.append(mark, `loss of ${run || "a run without a name"}`);
    document.getElementById("losses").append(key);
  });
  window.addEventListener("beforeprint", () => { document.querySelector("details").open = true; draw(); });
  draw();
})();
