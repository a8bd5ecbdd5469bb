"use strict";
// The gallery of a report: sorting, filtering, the keyboard, and what a clicked pixel read from the memory.
(() => {
  const byId = (id) => document.getElementById(id);
  const { examples, sources, images, classes } = JSON.parse(byId("gallery-data").textContent);
  const gallery = byId("gallery");
  const articles = [...gallery.children];
  const [sortMenu, orderButton, classMenu] = ["gallery-sort", "gallery-order", "gallery-class"].map(byId);
  let descending = false;

  function element(tag, className, ...children) {
    const node = document.createElement(tag);
    node.className = className;
    node.append(...children);
    return node;
  }

  // Order and choice

  function arrange() {
    const keyOf = (i) => examples[i].keys[Number(sortMenu.value)];
    const chosen = classMenu?.value ?? "";
    const order = [...articles.keys()].sort((a, b) => {
      const [x, y] = [keyOf(a), keyOf(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return (descending ? y - x : x - y) || a - b;
    });
    gallery.append(...order.map((i) => articles[i]));
    articles.forEach((article, i) => {
      article.hidden = chosen !== "" && !examples[i].tags.some((tag) => classes[tag].name === chosen);
    });
    orderButton.textContent = descending ? "↓ highest first" : "↑ lowest first";
    byId("gallery-count").textContent = `${shown().length} of ${articles.length} images`;
    makeCurrent(shown()[0]);
  }

  const shown = () => [...gallery.children].filter((article) => !article.hidden);

  sortMenu.addEventListener("change", () => {
    descending = "descending" in sortMenu.selectedOptions[0].dataset;
    arrange();
  });
  orderButton.addEventListener("click", () => {
    descending = !descending;
    arrange();
  });
  classMenu?.addEventListener("change", arrange);
  byId("gallery-large").addEventListener("change", (event) => gallery.classList.toggle("large", event.target.checked));
  byId("gallery-toolbar").addEventListener("submit", (event) => event.preventDefault());

  // What a pixel read

  function readingOf(row) {
    const article = row.closest(".example");
    const run = [...article.querySelectorAll(".row")].indexOf(row);
    return { reading: examples[articles.indexOf(article)].readings[run], run, article };
  }

  function pick(row, cell) {
    const { reading, run, article } = readingOf(row);
    const { rows, columns } = reading;
    const y = Math.min(rows - 1, Math.max(0, cell.y));
    const x = Math.min(columns - 1, Math.max(0, cell.x));
    Object.assign(row.dataset, { x, y });
    const panels = row.querySelector(".panels");
    panels.classList.add("picked");
    const marks = { "--x": x / columns, "--y": y / rows, "--w": 1 / columns, "--h": 1 / rows };
    for (const [name, share] of Object.entries(marks)) panels.style.setProperty(name, `${100 * share}%`);
    const top = reading.sources.length / (rows * columns);
    const start = (y * columns + x) * top;
    const items = [];
    let rest = 10000;
    for (let i = start; i < start + top; i++) {
      if (reading.weights[i] === 0) continue;
      rest -= reading.weights[i];
      items.push(sourceItem(sources[run][reading.sources[i]], reading.weights[i] / 100, article));
    }
    const others = element("li", "others", element("b", "", percent(Math.max(0, rest) / 100)), "from all others");
    const place = `row ${y + 1} of ${rows}, column ${x + 1} of ${columns}`;
    const box = row.querySelector(".reading");
    box.replaceChildren(element("p", "note", `What the pixels around ${place} read:`), element("ul", "", ...items, others));
    box.hidden = false;
  }

  function sourceItem([classIndex, imageIndex, contexts], share, article) {
    const { name, uri } = images[imageIndex] ?? { name: "unknown image", uri: null };
    const picture = uri ? element("img", "") : element("span", "gone", "no picture");
    if (uri) Object.assign(picture, { src: uri, alt: "" });
    const swatch = element("span", "swatch");
    swatch.style.setProperty("--c", classes[classIndex].color);
    const itself = name === examples[articles.indexOf(article)].id;
    const bar = element("span", "bar");
    bar.style.setProperty("--v", share);
    const text = element("span", "text", element("b", "", percent(share)), element("span", "", swatch, classes[classIndex].name));
    text.append(element("span", "name", itself ? "this image" : name), bar);
    const item = element("li", "", picture, text);
    item.title = `${name}: ${contexts} context${contexts === 1 ? "" : "s"} of ${classes[classIndex].name} in the memory`;
    return item;
  }

  const percent = (share) => `${share.toFixed(1)} %`;

  function unpick(row) {
    row.querySelector(".panels").classList.remove("picked");
    row.querySelector(".reading").hidden = true;
  }

  gallery.addEventListener("click", (event) => {
    const frame = event.target.closest(".frame");
    const row = frame?.closest(".row.live");
    if (!row) return;
    const box = frame.getBoundingClientRect();
    const { rows, columns } = readingOf(row).reading;
    const x = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const y = Math.floor(((event.clientY - box.top) / box.height) * rows);
    pick(row, { x, y });
  });

  // Keyboard: one stop for Tab per current example, and one for its picture

  function makeCurrent(current) {
    for (const article of articles) {
      article.tabIndex = article === current ? 0 : -1;
      for (const picker of article.querySelectorAll(".picker")) picker.tabIndex = article.tabIndex;
    }
  }

  function onArticleKey(event, article) {
    const all = shown();
    const place = all.indexOf(article);
    const next = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: all.length - 1 }[event.key];
    const target = event.key === "Enter" ? article.querySelector(".picker") : all[next];
    if (!target) return;
    event.preventDefault();
    target.focus();
  }

  function onPickerKey(event, row) {
    const { rows, columns } = readingOf(row).reading;
    const picked = row.querySelector(".picked");
    const [x, y] = picked ? [Number(row.dataset.x), Number(row.dataset.y)] : [columns >> 1, rows >> 1];
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Enter: [0, 0], " ": [0, 0] };
    const step = steps[event.key];
    if (step) pick(row, picked ? { x: x + step[0], y: y + step[1] } : { x, y });
    else if (event.key === "Escape") {
      unpick(row);
      row.closest(".example").focus();
    } else return;
    event.preventDefault();
  }

  gallery.addEventListener("focusin", (event) => makeCurrent(event.target.closest(".example")));
  gallery.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches(".example")) onArticleKey(event, event.target);
    else if (event.target.matches(".picker")) onPickerKey(event, event.target.closest(".row"));
  });

  // Only now, with the script running, the page offers what needs it

  for (const box of gallery.querySelectorAll(".reading")) {
    const row = box.closest(".row");
    const picker = row.querySelector(".frame");
    if (!picker) continue;
    row.classList.add("live");
    picker.classList.add("picker");
    picker.setAttribute("role", "application");
    picker.setAttribute("aria-label", `Pixels of ${row.closest(".example").getAttribute("aria-label")}: the arrows move, Escape leaves`);
  }
  for (const id of ["gallery-toolbar", "gallery-help"]) if (byId(id)) byId(id).hidden = false;
  arrange();
})();
