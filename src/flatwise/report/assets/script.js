"use strict";
// Three things: tables that sort, surfaces that turn together, figures as PNG. Without this file the page is read as it is.
document.documentElement.classList.add("js");
const say = (text) => { document.getElementById("said").textContent = text; };

// Tables. A row is a tbody, so that its note stays below it.
function keyOf(body, column) {
  const cell = body.rows[0].cells[column];
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim().toLowerCase();
}
function compare(a, b) {
  const numbers = (typeof a === "number") - (typeof b === "number");
  if (numbers !== 0) return -numbers;
  return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
}
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const rising = heading.getAttribute("aria-sort") !== "ascending";
    const rows = [...table.tBodies].map((body) => [keyOf(body, column), body]);
    rows.sort((a, b) => (rising ? compare(a[0], b[0]) : compare(b[0], a[0])));
    rows.forEach(([, body]) => table.append(body));
    headings.forEach((other) => other.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    say(`Sorted by ${heading.textContent}, ${rising ? "rising" : "falling"}.`);
  }));
}

// Surfaces: the same camera and the same drawing as surface3d.py.
const WIDTH = 440, HEIGHT = 360, NEAREST = 0.6, FARTHEST = 2.5;
const ON_WHITE = { edge: "#c4cad1", faint: "#57606a" };
const limit = (value, low, high) => Math.min(high, Math.max(low, value));
function colourAt(colours, share) {
  const place = limit(share, 0, 1) * (colours.length - 1);
  const number = Math.min(Math.floor(place), colours.length - 2);
  const mix = colours[number].map((a, i) => Math.round(a + (place - number) * (colours[number + 1][i] - a)));
  return `rgb(${mix.join(",")})`;
}
function projector(data, camera) {
  const a = camera.azimuth * Math.PI / 180, e = camera.elevation * Math.PI / 180;
  const [ca, sa, ce, se] = [Math.cos(a), Math.sin(a), Math.cos(e), Math.sin(e)];
  const scale = 0.29 * WIDTH * camera.zoom;
  return (x, y, height) => {
    const z = data.stretch * (2 * height - 1), front = x * sa + y * ca;
    return [WIDTH / 2 + scale * (x * ca - y * sa), HEIGHT / 2 + scale * (front * se - z * ce), front * ce + z * se];
  };
}
function line(context, points) {
  context.beginPath();
  points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
}
function drawBox(context, data, camera, at, ink, size) {
  const corners = [[-1, -1], [1, -1], [1, 1], [-1, 1]];
  context.strokeStyle = ink.edge;
  context.lineWidth = 1;
  line(context, corners.map(([x, y]) => at(x, y, 0)));
  context.closePath();
  context.stroke();
  context.fillStyle = ink.faint;
  context.font = `${size}px system-ui, sans-serif`;
  // Each direction is named on that of its two edges of the floor which is nearer.
  const name = (edge, text) => {
    const side = at(...edge(1), 0)[2] > at(...edge(-1), 0)[2] ? 1 : -1;
    const [x, y] = at(...edge(side * 1.1), 0), half = context.measureText(text).width / 2 + 2;
    context.textAlign = x < WIDTH / 2 ? "right" : "left";
    const [low, high] = x < WIDTH / 2 ? [2 * half, WIDTH] : [0, WIDTH - 2 * half];
    context.fillText(text, limit(x, low, high), limit(y + size, size, HEIGHT - 5));
  };
  if (camera.elevation > -5) {
    name((side) => [0, side], data.axes[0]);
    name((side) => [side, 0], data.axes[1]);
  }
  // The heights stand on the corner that is leftmost.
  const left = corners.reduce((best, corner) => (at(...corner, 0)[0] < at(...best, 0)[0] ? corner : best));
  line(context, [at(...left, 0), at(...left, 1)]);
  context.stroke();
  context.textAlign = "right";
  for (const [share, text] of data.ticks) {
    const [x, y] = at(...left, share);
    context.fillText(text, Math.max(x - 6, context.measureText(text).width + 1), y + size / 3);
  }
}
function draw(canvas, data, surface, camera, ink) {
  const ratio = Math.min(3, window.devicePixelRatio || 1);
  const wide = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.width = wide;
  canvas.height = Math.round(wide * HEIGHT / WIDTH);
  const context = canvas.getContext("2d");
  context.setTransform(wide / WIDTH, 0, 0, wide / WIDTH, 0, 0);
  context.lineJoin = "round";
  const at = projector(data, camera);
  // Letters keep their size where the drawing is small.
  drawBox(context, data, camera, at, ink, 12 * limit(WIDTH * ratio / wide, 1, 1.5));
  const heights = surface.heights, rows = heights.length, columns = heights[0].length, patches = [];
  const points = heights.map((row, i) => row.map((height, j) => (height === null ? null
    : at(2 * i / (rows - 1) - 1, 2 * j / (columns - 1) - 1, height))));
  for (let i = 0; i + 1 < rows; i++) {
    for (let j = 0; j + 1 < columns; j++) {
      const corners = [points[i][j], points[i + 1][j], points[i + 1][j + 1], points[i][j + 1]];
      if (corners.includes(null)) continue;
      const height = (heights[i][j] + heights[i + 1][j] + heights[i + 1][j + 1] + heights[i][j + 1]) / 4;
      patches.push([corners[0][2] + corners[1][2] + corners[2][2] + corners[3][2], corners, height]);
    }
  }
  patches.sort((a, b) => a[0] - b[0]);
  context.lineWidth = 0.6;
  for (const [, corners, height] of patches) {
    context.fillStyle = context.strokeStyle = colourAt(data.colours, height);
    line(context, corners);
    context.closePath();
    context.fill();
    context.stroke(); // closes the seams between the patches
    context.strokeStyle = "rgba(255, 255, 255, 0.22)";
    context.stroke();
  }
  canvas.dataset.azimuth = camera.azimuth;
  canvas.dataset.elevation = camera.elevation;
}
function turnable(group) {
  const data = JSON.parse(group.querySelector("script").textContent);
  const canvases = [...group.querySelectorAll("canvas")];
  const start = { azimuth: data.azimuth, elevation: data.elevation, zoom: 1 };
  const camera = { ...start };
  const sliders = [...group.querySelectorAll("input")];
  let asked = false;
  const paint = (printed = null) => {
    asked = false;
    const style = getComputedStyle(document.documentElement);
    const ink = printed ?? { edge: style.getPropertyValue("--edge"), faint: style.getPropertyValue("--faint") };
    canvases.forEach((canvas, i) => draw(canvas, data, data.surfaces[i], camera, ink));
  };
  const ask = () => { if (!asked) { asked = true; requestAnimationFrame(() => paint()); } };
  const turn = (azimuth, elevation, zoom = 1) => {
    camera.azimuth = ((Math.round(camera.azimuth + azimuth) + 180) % 360 + 360) % 360 - 180;
    camera.elevation = limit(Math.round(camera.elevation + elevation), -10, 90);
    camera.zoom = limit(camera.zoom * zoom, NEAREST, FARTHEST);
    [camera.azimuth, camera.elevation].forEach((value, i) => { sliders[i].value = value; });
    ask();
  };
  sliders.forEach((slider) => slider.addEventListener("input", () => {
    camera[slider.name] = Number(slider.value);
    ask();
  }));
  group.querySelector("button.reset").addEventListener("click", () => { Object.assign(camera, start); turn(0, 0); });
  const steps = { ArrowLeft: [-5, 0], ArrowRight: [5, 0], ArrowUp: [0, 5], ArrowDown: [0, -5] };
  for (const canvas of canvases) {
    canvas.addEventListener("keydown", (event) => {
      if (event.key in steps && !event.altKey && !event.ctrlKey && !event.metaKey) turn(...steps[event.key]);
      else if (event.key === "+" || event.key === "=") turn(0, 0, 1.15);
      else if (event.key === "-") turn(0, 0, 1 / 1.15);
      else return;
      event.preventDefault();
    });
    let held = null;
    canvas.addEventListener("pointerdown", (event) => {
      held = [event.clientX, event.clientY];
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (held === null) return;
      // A finger that moves up or down scrolls the page (touch-action: pan-y); only a mouse or a pen tilts.
      turn(-(event.clientX - held[0]) * 0.5, event.pointerType === "touch" ? 0 : (event.clientY - held[1]) * 0.4);
      held = [event.clientX, event.clientY];
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { held = null; });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return; // the wheel alone scrolls the page
      event.preventDefault();
      turn(0, 0, event.deltaY < 0 ? 1.1 : 1 / 1.1);
    }, { passive: false });
  }
  group.classList.add("turning");
  new ResizeObserver(ask).observe(group);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ask);
  addEventListener("beforeprint", () => paint(ON_WHITE)); // paper is white, whatever the screen is
  addEventListener("afterprint", ask);
  paint();
}
document.querySelectorAll(".surfaces-group").forEach(turnable);

// PNG: of a chart from its own SVG file, of surfaces as they are turned.
function save(canvas, name) {
  canvas.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`Saved ${name}.`);
  });
}
function white(width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, width, height);
  return [canvas, context];
}
for (const button of document.querySelectorAll("button.png")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const figure = button.closest("figure");
    const image = new Image();
    image.onload = () => {
      const [canvas, context] = white(image.width * 3, image.height * 3);
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      const group = figure.querySelector(".surfaces-group.turning");
      if (group !== null) {
        const data = JSON.parse(group.querySelector("script").textContent);
        const shown = group.querySelector("canvas").dataset;
        const camera = { azimuth: Number(shown.azimuth), elevation: Number(shown.elevation), zoom: 1 };
        data.surfaces.forEach((surface, i) => {
          const [own, inside] = white(WIDTH * 3, HEIGHT * 3);
          inside.fillStyle = "#1b1f24";
          Object.defineProperty(own, "clientWidth", { value: WIDTH * 3 / Math.min(3, window.devicePixelRatio || 1) });
          draw(own, data, surface, camera, ON_WHITE);
          context.fillStyle = "#ffffff";
          context.fillRect(i * WIDTH * 3, 30 * 3, WIDTH * 3, (HEIGHT - 30) * 3);
          context.drawImage(own, i * WIDTH * 3, 0);
        });
      }
      save(canvas, button.dataset.name);
    };
    image.src = figure.querySelector("a[download]").href;
  });
}
