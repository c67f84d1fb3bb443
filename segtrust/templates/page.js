/* The slices of one patient: scans are pictures with a tile per axial slice, all else is a byte per voxel. */
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const about = JSON.parse(byId("about").textContent);
  const shape = about.shape, spacing = about.spacing_mm, regions = about.regions;
  const strides = [1, shape[0], shape[0] * shape[1]];
  // columns run along `across` and rows along `up`, both towards smaller numbers: the patient's right is on the left
  const PLANES = {
    axial: { across: 0, up: 1, through: 2, letters: ["R", "L", "A", "P"] },
    coronal: { across: 0, up: 2, through: 1, letters: ["R", "L", "S", "I"] },
    sagittal: { across: 1, up: 2, through: 0, letters: ["A", "P", "S", "I"] },
  };
  const NAMES = {
    scan: "Scan", segmentation: "Prediction", reference: "Reference", probability: "Probability", entropy: "Entropy",
    errors: "Errors", none: "Scan",
  };
  const MISSED = [230, 159, 0], FALSE_ALARM = [86, 180, 233];
  const at = [...about.start];
  const state = { layout: "overlaid", planes: "all", region: regions[0], modality: about.background,
                  overlay: "entropy", opacity: 0.8, predicted: true, reference: about.has_reference };
  const volumes = {}, pictures = {};
  let panels = [];

  // --- what travels in the page ---

  async function unpacked(id) {
    const bytes = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }
  function widened(small, step) {
    if (step === 1) return small;
    const [nx, ny, nz] = shape, sx = Math.ceil(nx / step), sy = Math.ceil(ny / step);
    const whole = new Uint8Array(nx * ny * nz);
    for (let k = 0, n = 0; k < nz; k++)
      for (let j = 0; j < ny; j++) {
        const row = sx * (Math.floor(j / step) + sy * Math.floor(k / step));
        for (let i = 0; i < nx; i++) whole[n++] = small[row + Math.floor(i / step)];
      }
    return whole;
  }
  async function pictureOf(modality) {
    if (!pictures[modality]) {
      const image = new Image();
      image.src = "data:image/webp;base64," + byId("scan-" + modality).textContent;
      await image.decode();
      pictures[modality] = image;
    }
    return pictures[modality];
  }

  // --- colours ---

  const probabilityOf = Float32Array.from({ length: 256 }, (_, code) => Math.sin((Math.PI * code) / 510) ** 2);
  const entropyOf = probabilityOf.map((p) => (p > 0 && p < 1 ? -(p * Math.log2(p) + (1 - p) * Math.log2(1 - p)) : 0));
  const rgb = (hex) => [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
  function scale(name) {
    const stops = about.scales[name].map(rgb);
    return (value) => {
      const place = Math.min(Math.max(value, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
      return stops[low].map((part, channel) => part + (place - low) * (stops[low + 1][channel] - part));
    };
  }
  const colourOf = { probability: scale("probability"), entropy: scale("entropy") };
  const regionColours = regions.map((region) => rgb(about.colours[region]));
  function lookup(values, name, from) {
    const table = new Uint8ClampedArray(4 * 256);
    values.forEach((value, code) => table.set([...colourOf[name](value), value < from ? 0 : 255], 4 * code));
    return table;
  }
  const tables = {
    probability: lookup(probabilityOf, "probability", about.shown_from),
    entropy: lookup(entropyOf, "entropy", about.shown_from),
  };
  /** Return four bytes of colour for each byte of `bits`. */
  function tableOfBits(kind) {
    const table = new Uint8ClampedArray(4 * 256), place = regions.indexOf(state.region);
    for (let code = 0; code < 128; code++) {
      const own = kind === "reference" ? code >> 3 : code;
      if (kind === "errors") {
        const [said, is] = [(code >> place) & 1, (code >> (3 + place)) & 1];
        if (said !== is) table.set([...(is ? MISSED : FALSE_ALARM), 255], 4 * code);
      } else
        regionColours.forEach((colour, region) => (own >> region) & 1 && table.set([...colour, 255], 4 * code));
    }
    return table;
  }

  // --- drawing ---

  const scratch = () => document.createElement("canvas").getContext("2d");
  const under = scratch(), over = scratch();

  function drawScan(plane, image) {
    const { across, up, through } = PLANES[plane], [nx, ny, nz] = shape, width = shape[across], height = shape[up];
    under.canvas.width = width;
    under.canvas.height = height;
    under.imageSmoothingEnabled = false;
    const left = (k) => (k % about.columns) * nx, top = (k) => Math.floor(k / about.columns) * ny, n = at[through];
    under.setTransform(-1, 0, 0, -1, width, height);
    if (plane === "axial") under.drawImage(image, left(n), top(n), nx, ny, 0, 0, nx, ny);
    if (plane === "coronal")
      for (let k = 0; k < nz; k++) under.drawImage(image, left(k), top(k) + n, nx, 1, 0, k, nx, 1);
    if (plane === "sagittal") {
      under.setTransform(0, -1, -1, 0, width, height);
      for (let k = 0; k < nz; k++) under.drawImage(image, left(k) + n, top(k), 1, ny, k, 0, 1, ny);
    }
  }
  /** Return the bytes of a slice as it is seen, row by row from top left. */
  function slice(volume, plane) {
    const { across, up, through } = PLANES[plane], width = shape[across], height = shape[up];
    const seen = new Uint8Array(width * height), first = at[through] * strides[through];
    for (let row = 0, n = 0; row < height; row++) {
      const begin = first + (height - 1 - row) * strides[up] + (width - 1) * strides[across];
      for (let column = 0; column < width; column++) seen[n++] = volume[begin - column * strides[across]];
    }
    return seen;
  }
  function drawColours(plane, seen, table) {
    const { across, up } = PLANES[plane], width = shape[across], height = shape[up];
    over.canvas.width = width;
    over.canvas.height = height;
    const image = over.createImageData(width, height), words = new Uint32Array(image.data.buffer);
    const colours = new Uint32Array(table.buffer);
    for (let n = 0; n < seen.length; n++) words[n] = colours[seen[n]];
    over.putImageData(image, 0, 0);
  }
  /** Trace the edges between pixels that are inside and those that are not; every second one only where dotted. */
  function outline(context, seen, width, height, bit, colour, dotted) {
    const sx = context.canvas.width / width, sy = context.canvas.height / height;
    const inside = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : (seen[y * width + x] >> bit) & 1);
    context.beginPath();
    for (let y = 0; y <= height; y++)
      for (let x = 0; x <= width; x++) {
        if (dotted && (x + y) % 2) continue;
        const here = inside(x, y);
        if (here !== inside(x - 1, y)) context.moveTo(x * sx, y * sy), context.lineTo(x * sx, (y + 1) * sy);
        if (here !== inside(x, y - 1)) context.moveTo(x * sx, y * sy), context.lineTo((x + 1) * sx, y * sy);
      }
    context.lineCap = dotted ? "butt" : "square";
    const ratio = window.devicePixelRatio || 1;
    for (const [stroke, size] of [["rgba(0, 0, 0, 0.7)", 3.2], [colour, 1.7]]) {
      context.strokeStyle = stroke;
      context.lineWidth = size * ratio;
      context.stroke();
    }
  }
  function draw({ plane, kind, canvas }) {
    const { across, up, through, letters } = PLANES[plane], width = shape[across], height = shape[up];
    const ratio = window.devicePixelRatio || 1, wide = Math.max(Math.round(canvas.clientWidth * ratio), 1);
    canvas.width = wide;
    canvas.height = Math.round((wide * height * spacing[up]) / (width * spacing[across]));
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, canvas.width, canvas.height);
    drawScan(plane, pictures[state.modality]);
    context.imageSmoothingQuality = "high";
    context.drawImage(under.canvas, 0, 0, canvas.width, canvas.height);
    const bits = slice(volumes.bits, plane), named = kind === "overlaid" ? state.overlay : kind;
    if (named === "probability" || named === "entropy")
      drawColours(plane, slice(volumes[state.region], plane), tables[named]);
    else if (named !== "scan" && named !== "none") drawColours(plane, bits, tableOfBits(named));
    if (named !== "scan" && named !== "none") {
      context.imageSmoothingEnabled = false;
      context.globalAlpha = state.opacity;
      context.drawImage(over.canvas, 0, 0, canvas.width, canvas.height);
      context.globalAlpha = 1;
    }
    const place = regions.indexOf(state.region);
    if (state.predicted) outline(context, bits, width, height, place, about.colours[state.region], false);
    if (state.reference) outline(context, bits, width, height, 3 + place, "#ffffff", true);
    const x = ((width - 0.5 - at[across]) * canvas.width) / width, y = ((height - 0.5 - at[up]) * canvas.height) / height;
    const gap = 9 * ratio;
    context.beginPath();
    for (const [from, to] of [[0, x - gap], [x + gap, canvas.width]]) context.moveTo(from, y), context.lineTo(to, y);
    for (const [from, to] of [[0, y - gap], [y + gap, canvas.height]]) context.moveTo(x, from), context.lineTo(x, to);
    context.strokeStyle = "rgba(255, 255, 255, 0.45)";
    context.lineWidth = ratio;
    context.stroke();
    context.font = `600 ${12 * ratio}px system-ui, sans-serif`;
    context.fillStyle = "#e8eaed";
    context.textBaseline = "middle";
    const edge = 6 * ratio, w = canvas.width, h = canvas.height;
    for (const [letter, align, lx, ly] of [[letters[0], "left", edge, h / 2], [letters[1], "right", w - edge, h / 2],
        [letters[2], "center", w / 2, edge + 6 * ratio], [letters[3], "center", w / 2, h - edge - 6 * ratio]]) {
      context.textAlign = align;
      context.fillText(letter, lx, ly);
    }
    const name = nameOf(named);
    canvas.setAttribute("aria-label", `${plane}, ${name}, slice ${at[through] + 1} of ${shape[through]}`);
    canvas.parentNode.querySelector(".what").textContent = `${name} · ${plane}`;
  }
  const nameOf = (kind) =>
    kind === "scan" || kind === "none" ? about.modality_names[state.modality]
      : kind === "segmentation" || kind === "reference" ? NAMES[kind] : `${NAMES[kind]}, ${state.region}`;

  // --- what is at the cross ---

  function tell() {
    const where = at[0] + at[1] * strides[1] + at[2] * strides[2], bits = volumes.bits[where];
    regions.forEach((region, place) => {
      const code = volumes[region][where], said = (bits >> place) & 1, is = (bits >> (3 + place)) & 1;
      const cells = byId("at-" + region).querySelectorAll("td");
      const words = [probabilityOf[code].toFixed(2), entropyOf[code].toFixed(2), said ? "in" : "out"];
      if (about.has_reference) words.push(is ? "in" : "out", said === is ? "right" : is ? "missed" : "false alarm");
      words.forEach((word, n) => (cells[n].textContent = word));
      if (about.has_reference) cells[4].className = said === is ? "" : "bad";
    });
    const mm = about.affine.map((row) => row[0] * at[0] + row[1] * at[1] + row[2] * at[2] + row[3]);
    byId("at-mm").textContent = mm.map((value) => value.toFixed(1).replace("-", "−")).join(", ");
    for (const [plane, { through }] of Object.entries(PLANES)) {
      byId("slice-" + plane).value = at[through];
      byId("slice-" + plane + "-said").textContent = `${at[through] + 1} of ${shape[through]}`;
    }
  }

  // --- panels and controls ---

  function lay() {
    const overlaid = state.layout === "overlaid", planes = state.planes === "all" ? Object.keys(PLANES) : [state.planes];
    const kinds = overlaid ? ["overlaid"] : ["scan", "segmentation", "reference", "probability", "entropy"];
    const shown = kinds.filter((kind) => kind !== "reference" || about.has_reference);
    const grid = byId("panels");
    grid.replaceChildren();
    grid.className = `panels ${state.layout}${planes.length === 1 ? " single" : ""}`;
    // planes of different proportions are equally high
    const proportion = ({ across, up }) => (shape[across] * spacing[across]) / (shape[up] * spacing[up]);
    const tracks = planes.map((plane) => `minmax(0, ${proportion(PLANES[plane]).toFixed(3)}fr)`).join(" ");
    grid.style.setProperty("--tracks", overlaid ? tracks : `repeat(${shown.length}, minmax(0, 1fr))`);
    panels = planes.flatMap((plane) => shown.map((kind) => {
      const figure = document.createElement("div"), what = document.createElement("p"), canvas = document.createElement("canvas");
      what.className = "what";
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "img");
      const panel = { plane, kind, canvas };
      canvas.dataset.plane = plane;
      canvas.dataset.kind = kind;
      listen(panel);
      figure.append(what, canvas);
      grid.append(figure);
      return panel;
    }));
    byId("overlay").disabled = !overlaid;
    show();
  }
  function show() {
    panels.forEach(draw);
    tell();
    const used = new Set(panels.map(({ kind }) => (kind === "overlaid" ? state.overlay : kind)));
    document.querySelectorAll("[data-legend]").forEach((legend) => {
      legend.hidden = !legend.dataset.legend.split(" ").some((kind) => used.has(kind));
    });
    byId("legend-predicted").hidden = !state.predicted;
    if (about.has_reference) byId("legend-reference").hidden = !state.reference;
    document.querySelectorAll(".its-region").forEach((part) => (part.textContent = state.region));
    byId("panels").style.setProperty("--region", about.colours[state.region]);
    byId("legend-predicted").style.setProperty("--region", about.colours[state.region]);
  }
  let waiting = 0;
  const later = () => (waiting ||= requestAnimationFrame(() => ((waiting = 0), show())));
  function move(axis, to) {
    at[axis] = Math.min(Math.max(Math.round(to), 0), shape[axis] - 1);
    later();
  }
  function listen({ plane, canvas }) {
    const { across, up, through } = PLANES[plane];
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      move(across, shape[across] - 0.5 - ((event.clientX - box.left) / box.width) * shape[across]);
      move(up, shape[up] - 0.5 - ((event.clientY - box.top) / box.height) * shape[up]);
    };
    canvas.addEventListener("click", point);
    canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && event.buttons === 1 && point(event));
    // a page scrolls as usual until a slice was chosen
    canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== canvas || event.ctrlKey || !event.deltaY) return;
      event.preventDefault();
      move(through, at[through] - Math.sign(event.deltaY));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [across, 1], ArrowRight: [across, -1], ArrowUp: [up, 1], ArrowDown: [up, -1],
                      PageUp: [through, 1], PageDown: [through, -1] };
      const step = steps[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      move(step[0], at[step[0]] + step[1] * (event.shiftKey ? 10 : 1));
    });
  }
  function go(start) {
    start.forEach((n, axis) => (at[axis] = n));
    show();
  }
  function control() {
    for (const name of ["layout", "region"])
      document.querySelectorAll(`input[name=${name}]`).forEach((input) => input.addEventListener("change", () => {
        state[name] = input.value;
        name === "layout" ? lay() : show();
      }));
    byId("modality").addEventListener("change", async (event) => {
      await pictureOf(event.target.value);
      state.modality = event.target.value;
      show();
    });
    byId("planes").addEventListener("change", (event) => ((state.planes = event.target.value), lay()));
    byId("overlay").addEventListener("change", (event) => ((state.overlay = event.target.value), show()));
    byId("opacity").addEventListener("input", (event) => ((state.opacity = event.target.value / 100), later()));
    for (const name of ["predicted", "reference"])
      byId("outline-" + name)?.addEventListener("change", (event) => ((state[name] = event.target.checked), show()));
    for (const [plane, { through }] of Object.entries(PLANES))
      byId("slice-" + plane).addEventListener("input", (event) => move(through, +event.target.value));
    byId("to-start").addEventListener("click", () => go(about.start));
    byId("to-region").addEventListener("click", () => go(about.starts[state.region]));
    let width = window.innerWidth;
    window.addEventListener("resize", () => width !== window.innerWidth && ((width = window.innerWidth), later()));
    window.addEventListener("beforeprint", show);
  }

  // --- neighbours by rank, of the file that all pages of a model share ---

  function neighbours() {
    const order = window.segtrustOrder, here = order ? order.patients.indexOf(about.patient) : -1;
    if (here < 0 || !order.orders.length) return;
    const choice = byId("order");
    order.orders.forEach((one, n) => choice.append(new Option(one.name, n)));
    const tellRank = () => {
      const one = order.orders[choice.value], place = one.ranks.indexOf(here);
      byId("rank").textContent = place < 0 ? "no rank: this patient has no such number"
        : `${place + 1} of ${one.ranks.length}, ${one.first} first`;
      for (const [id, step] of [["previous", -1], ["next", 1]]) {
        let other = place < 0 ? -1 : place + step;
        while (other >= 0 && other < one.ranks.length && order.pages && !order.pages.includes(one.ranks[other])) other += step;
        const there = place >= 0 && other >= 0 && other < one.ranks.length, link = byId(id);
        if (there) link.href = encodeURIComponent(order.patients[one.ranks[other]]) + ".html#" + choice.value;
        else link.removeAttribute("href");
        link.title = there ? order.patients[one.ranks[other]] : "";
      }
    };
    choice.addEventListener("change", tellRank);
    const asked = location.hash.slice(1);
    if (asked && order.orders[asked]) choice.value = asked;
    tellRank();
    byId("neighbours").hidden = false;
  }

  async function begin() {
    neighbours();
    if (!("DecompressionStream" in window)) throw new Error("this browser is too old; one of 2023 or later is needed");
    volumes.bits = await unpacked("bits");
    for (const region of regions) volumes[region] = widened(await unpacked("probability-" + region), about.step);
    await pictureOf(state.modality);
    control();
    byId("viewer").hidden = false;
    byId("waiting").remove();
    lay();
    document.body.dataset.ready = "yes";
  }
  begin().catch((error) => (byId("waiting").textContent = `The slices cannot be shown: ${error.message}`));
})();
