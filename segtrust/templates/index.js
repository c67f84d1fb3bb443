// Charts come alive as they come into view: until then, and on paper, the page shows their pictures.
(() => {
  "use strict";
  const specifications = {};
  const files = {};
  const views = new WeakMap();

  window.segtrustCharts = (charts) => Object.assign(specifications, charts);

  const load = (address) =>
    (files[address] ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = address;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${address} is not beside this page`));
      document.head.append(script);
    }));

  const chosenMask = (plot) => plot.closest("figure").querySelector("select")?.value;

  async function enliven(plot) {
    await load("assets/vega.js");
    await load(plot.dataset.from);
    const live = document.createElement("div");
    live.className = "live";
    const image = plot.querySelector("img");
    live.setAttribute("role", "img");
    live.setAttribute("aria-label", image.alt);
    plot.prepend(live);
    const options = { renderer: "svg", actions: false, defaultStyle: false, loader: { target: "_self" } };
    const { view } = await window.vegaEmbed(live, specifications[plot.dataset.chart], options);
    views.set(plot, view);
    plot.dataset.live = "";
    const mask = chosenMask(plot);
    if (mask) await choose(plot, mask);
  }

  const choose = (plot, mask) => {
    const has = plot.dataset.masks.split(" ").includes(mask);
    plot.toggleAttribute("data-without", !has);
    const said = has ? `, mask ${mask}` : `: no voxels in ${mask}`;
    plot.querySelector(".live").setAttribute("aria-label", plot.querySelector("img").alt + said);
    return has && views.get(plot).signal("mask", mask).runAsync();
  };

  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
        watcher.unobserve(target);
        enliven(target).catch((error) => console.error(String(error)));
      }
    },
    { rootMargin: "300px" },
  );
  document.querySelectorAll("[data-chart]").forEach((plot) => watcher.observe(plot));
  document.querySelectorAll("figure select").forEach((select) =>
    select.addEventListener("change", () =>
      select.closest("figure").querySelectorAll("[data-live]").forEach((plot) => choose(plot, select.value)),
    ),
  );
  document.body.dataset.ready = "";
})();
