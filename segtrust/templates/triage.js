/* The list of a model's patients: sorted and filtered here, drawn some hundred rows at a time. */
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const { columns, rows, pages, folder } = JSON.parse(byId("content").textContent);
  const AT_ONCE = 200;
  const numbers = columns.map(({ kind }, n) => kind === "number" && rows.map((row) => (row[n] === "" ? NaN : +row[n])));
  const lower = rows.map((row) => row.map((cell) => cell.toLowerCase()));
  const whole = lower.map((row) => row.join("\n"));
  const inWords = new Intl.Collator("en", { numeric: true });
  const NOTES = 1;
  const start = columns.findIndex(({ group }) => group.startsWith("Entropy"));
  let sort = { column: Math.max(start, 0), down: start > 0 }, filters = columns.map(() => ""), found = [], drawn = 0;

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // --- filter and sort ---

  /** Return a test of a row's place for what was typed under a heading. */
  function testOf(column, typed) {
    const text = typed.trim().toLowerCase(), values = numbers[column];
    if (!text) return null;
    const compared = values && text.match(/^(<=|>=|<|>|=)\s*(-?[\d.]+)$/);
    const range = values && text.match(/^(-?[\d.]+)\s*(?:–|\.\.|-)\s*(-?[\d.]+)$/);
    if (compared) {
      const limit = +compared[2];
      return { "<": (n) => values[n] < limit, "<=": (n) => values[n] <= limit, ">": (n) => values[n] > limit,
               ">=": (n) => values[n] >= limit, "=": (n) => values[n] === limit }[compared[1]];
    }
    if (range) return (n) => values[n] >= +range[1] && values[n] <= +range[2];
    if (values && /^[<>=]/.test(text)) return null; // not yet a number
    return (n) => lower[n][column].includes(text);
  }
  function find() {
    const tests = filters.map((typed, column) => testOf(column, typed)).filter(Boolean);
    const anywhere = byId("anywhere").value.trim().toLowerCase();
    if (anywhere) tests.push((n) => whole[n].includes(anywhere));
    if (byId("noted").checked) tests.push((n) => rows[n][NOTES] !== "");
    found = rows.map((_, n) => n).filter((n) => tests.every((test) => test(n)));
    const { column, down } = sort, values = numbers[column], sign = down ? -1 : 1;
    const missing = (n) => (values ? Number.isNaN(values[n]) : rows[n][column] === "");
    found.sort((a, b) => missing(a) - missing(b)
      || (missing(a) ? 0 : sign * (values ? values[a] - values[b] : inWords.compare(rows[a][column], rows[b][column])))
      || a - b);
  }

  // --- draw ---

  const table = byId("list"), head = table.createTHead(), body = table.createTBody();
  const shown = () => columns.map((_, n) => n).filter((n) => !columns[n].further || byId("further").checked);
  const begins = (n, n_before) => n_before !== undefined && columns[n].group !== columns[n_before].group;
  const largest = columns.map(({ group }, n) => (group.startsWith("Predicted") && numbers[n]
    ? numbers[n].reduce((most, value) => (value > most ? value : most), 0) || 1 : 1));
  const barred = columns.map(({ group, further }) => group !== "" && !further);

  function drawHead() {
    head.replaceChildren();
    const groups = head.insertRow(), names = head.insertRow(), fields = head.insertRow(), used = shown();
    used.forEach((n, place) => {
      const { name, group, kind } = columns[n], first = begins(n, used[place - 1]) ? " first" : "";
      if (place === 0 || begins(n, used[place - 1])) {
        const span = used.slice(place).findIndex((other) => columns[other].group !== group);
        const said = element(group ? "th" : "td", group,
          { class: "of" + first + (n ? "" : " who"), colspan: n ? (span < 0 ? used.length - place : span) : 1 });
        if (group) said.scope = "colgroup";
        groups.append(said);
        if (n === 0) groups.append(element("td"));
      }
      const cell = element("th", undefined, { scope: "col", class: kind + first + (n ? "" : " who") });
      const button = element("button", name, { type: "button", title: group ? `${group}: ${name}` : name });
      if (sort.column === n) cell.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
      button.dataset.column = n;
      cell.append(button);
      names.append(cell);
      const under = element("th", undefined, { class: kind + first + (n ? "" : " who") });
      const input = element("input", undefined, { type: "search", "aria-label": `filter ${group} ${name}`, placeholder: "filter", size: 6 });
      input.value = filters[n];
      input.dataset.column = n;
      under.append(input);
      fields.append(under);
    });
  }
  function rowOf(n, used) {
    const made = document.createElement("tr");
    used.forEach((column, place) => {
      const text = rows[n][column], cell = document.createElement(column ? "td" : "th");
      if (column === 0) {
        cell.scope = "row";
        if (pages[n]) cell.append(element("a", text, { href: folder + encodeURIComponent(text) + ".html" }));
        else cell.textContent = text;
      } else {
        cell.textContent = text === "" && numbers[column] ? "–" : text;
        cell.className = column === NOTES ? "note" : columns[column].kind;
        if (columns[column].kind === "text") cell.title = text;
        if (column === NOTES && text.includes("missed")) cell.classList.add("noted");
        if (begins(column, used[place - 1])) cell.classList.add("first");
        if (barred[column] && text !== "") {
          cell.classList.add("bar");
          cell.style.setProperty("--part", (+text / largest[column]).toFixed(3));
        }
      }
      made.append(cell);
    });
    return made;
  }
  function drawMore(many) {
    const used = shown(), part = document.createDocumentFragment();
    for (const n of found.slice(drawn, drawn + many)) part.append(rowOf(n, used));
    body.append(part);
    drawn = Math.min(drawn + many, found.length);
    byId("more").hidden = drawn === found.length;
    byId("more").textContent = `Show all ${found.length.toLocaleString("en")} (${drawn} are shown)`;
  }
  function show() {
    find();
    body.replaceChildren();
    drawn = 0;
    drawMore(AT_ONCE);
    if (!found.length) {
      const cell = element("td", "No patient fits all filters.", { class: "empty", colspan: shown().length });
      body.insertRow().append(cell);
    }
    const all = rows.length.toLocaleString("en");
    byId("count").textContent = found.length === rows.length ? `${all} patients` : `${found.length.toLocaleString("en")} of ${all} patients`;
  }
  function redraw() {
    drawHead();
    show();
  }

  head.addEventListener("click", (event) => {
    const column = event.target.closest("button")?.dataset.column;
    if (column === undefined) return;
    sort = { column: +column, down: sort.column === +column ? !sort.down : columns[column].group.startsWith("Entropy") };
    redraw();
    head.querySelector(`button[data-column="${column}"]`).focus();
  });
  head.addEventListener("input", (event) => {
    filters[event.target.dataset.column] = event.target.value;
    show();
  });
  byId("anywhere").addEventListener("input", show);
  byId("noted").addEventListener("change", show);
  byId("further")?.addEventListener("change", redraw);
  byId("more").addEventListener("click", () => drawMore(Infinity));
  byId("start-again").addEventListener("click", () => {
    byId("controls").reset();
    filters = columns.map(() => "");
    sort = { column: Math.max(start, 0), down: start > 0 };
    redraw();
  });
  redraw();
  document.body.dataset.ready = "yes";
})();
