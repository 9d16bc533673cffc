// The samples: side by side, one run at a time, or before and after; filtered and sorted; drawn as they come near.
(() => {
  const store = document.getElementById("samples-data");
  if (!store) return;
  const data = JSON.parse(store.textContent);
  const { runs, prompts, figures, judged, pairs, cells, pictures } = data;
  const find = (name) => document.getElementById(name);
  const [grid, sentinel, count, tip, dialog] = ["cards", "more", "count", "tip", "dialog"].map(find);
  const VIEWS = ["side", "one", "wipe"];
  const AT_ONCE = 36; // cards drawn at a time
  const last = Math.min(1, runs.length - 1); // the first run is what the others are held against
  let state = { view: "side", run: last, left: 0, right: last, hidden: new Set() };
  let order = [];
  let drawn = 0;
  let open = null; // the [run, pair] that the dialog shows
  let from = null; // what had the focus before it

  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const figure = (run, pair, place) => cells[run][pair]?.[place + 1] ?? null;
  const written = (value) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (value !== 0 && size < 0.001) return value.toExponential(1);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
  };
  const promptOf = (pair) => prompts[pairs[pair][0]] || "no prompt";
  const nameOf = (run, pair) => `${runs[run]}, “${promptOf(pair)}”, seed ${pairs[pair][1]}`;
  const keyOf = (run) => document.querySelector(`#run-keys [data-run="${run}"] svg`).cloneNode(true);

  // What is shown, and in which order

  const ranks = new Map();
  const rank = (run, place) => {
    const name = `${run} ${place}`;
    if (!ranks.has(name)) {
      const known = pairs.map((_, pair) => pair).filter((pair) => figure(run, pair, place) !== null);
      known.sort((a, b) => figure(run, a, place) - figure(run, b, place));
      ranks.set(name, new Map(known.map((pair, i) => [pair, i / Math.max(known.length - 1, 1)])));
    }
    return ranks.get(name);
  };
  const difference = (a, b) => (a === null || b === null || a === undefined || b === undefined ? null : a - b);
  const chosen = () => (state.view === "wipe" ? [state.left, state.right] : [0, state.run]);
  const gain = (pair, place) => difference(figure(chosen()[1], pair, place), figure(chosen()[0], pair, place));
  const SORTS = {
    given: () => null,
    high: (pair) => figure(chosen()[1], pair, state.figure),
    low: (pair) => difference(0, figure(chosen()[1], pair, state.figure)),
    gain: (pair) => gain(pair, state.figure),
    loss: (pair) => difference(0, gain(pair, state.figure)),
    disagreement: (pair) => {
      const gap = difference(rank(chosen()[1], 0).get(pair), rank(chosen()[1], judged).get(pair));
      return gap === null ? null : Math.abs(gap);
    },
  };
  const KEPT = {
    all: () => true,
    parted: (pair) => (gain(pair, 0) ?? 0) > 0 && (gain(pair, judged) ?? 0) < 0,
    missing: (pair) => cells.some((cell) => (cell[pair]?.[0] ?? -1) < 0),
  };

  const choose = () => {
    const words = find("search").value.trim().toLowerCase();
    const least = find("least").value === "" ? null : Number(find("least").value);
    const sort = find("sort").value;
    state.figure = Number(find("figure").value);
    order = pairs.map((_, pair) => pair).filter((pair) => {
      if (words && !promptOf(pair).toLowerCase().includes(words)) return false;
      const value = figure(chosen()[1], pair, state.figure);
      return (least === null || (value !== null && value >= least)) && KEPT[find("only").value](pair);
    });
    if (sort !== "given") {
      const keys = new Map(order.map((pair) => [pair, SORTS[sort](pair)]));
      order.sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        return x === null || y === null ? (x === null) - (y === null) : y - x;
      });
    }
  };

  // Drawing

  const picture = (run, pair) => {
    const place = cells[run][pair]?.[0] ?? -1;
    if (place < 0) return make("span", { class: "blank", role: "img", "aria-label": `no picture: ${nameOf(run, pair)}` });
    const image = make("img", { alt: nameOf(run, pair), decoding: "async" });
    image.src = pictures[place];
    return image;
  };
  const caption = (run, pair, withName) => {
    const text = make("span", { class: "caption" }, keyOf(run));
    text.append(make("span", {}, withName ? `${runs[run]} ` : "", written(figure(run, pair, 0))));
    return text;
  };
  const shot = (run, pair, withName = false) =>
    make("button", { class: "shot", type: "button", "data-run": run, "data-pair": pair },
      picture(run, pair), caption(run, pair, withName));
  const wipe = (pair) => {
    const { left, right } = state;
    return make("div", { class: "both" },
      make("button", { class: "shot wipe", type: "button", "data-run": right, "data-pair": pair },
        picture(left, pair), make("span", { class: "over" }, picture(right, pair))),
      caption(left, pair, false), caption(right, pair, false));
  };
  const shots = (pair) => {
    if (state.view === "one") return [shot(state.run, pair)];
    if (state.view === "wipe") return [wipe(pair)];
    return runs.map((_, run) => run).filter((run) => !state.hidden.has(run)).map((run) => shot(run, pair));
  };
  const card = (pair) => {
    const prompt = make("p", { class: "prompt", dir: "auto", title: promptOf(pair) }, promptOf(pair));
    return make("article", { class: "card", "data-pair": pair },
      prompt, make("p", { class: "seed" }, `seed ${pairs[pair][1]}`), make("div", { class: "shots" }, ...shots(pair)));
  };
  const more = () => {
    const next = order.slice(drawn, drawn + AT_ONCE);
    grid.append(...next.map(card));
    drawn += next.length;
    sentinel.hidden = drawn >= order.length;
  };
  const near = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting) || drawn >= order.length) return;
    more();
    near.unobserve(sentinel); // else it stays in sight without a word
    near.observe(sentinel);
  }, { rootMargin: "1200px" });

  const redraw = () => {
    const had = grid.contains(document.activeElement) ? document.activeElement.dataset : null;
    choose();
    drawn = 0;
    grid.replaceChildren();
    grid.dataset.view = state.view;
    more();
    const of = order.length === pairs.length ? "" : ` of ${pairs.length.toLocaleString("en")}`;
    const what = state.view === "one" ? `, ${runs[state.run]}` : "";
    count.textContent = `${order.length.toLocaleString("en")}${of} samples${what}`;
    if (had) grid.querySelector(`[data-pair="${had.pair}"] .shot`)?.focus();
  };
  const refresh = () => { // the same samples, other runs: what is drawn stays where it is
    for (const each of grid.children) each.lastElementChild.replaceChildren(...shots(Number(each.dataset.pair)));
  };

  // Controls

  const show = () => {
    for (const view of VIEWS) find(`view-${view}`).checked = view === state.view;
    for (const each of document.querySelectorAll("[data-for]")) each.hidden = !each.dataset.for.split(" ").includes(state.view);
    find("run").value = state.run;
    find("run-slider").value = state.run;
    find("run-slider").setAttribute("aria-valuetext", runs[state.run]);
    find("left").value = state.left;
    find("right").value = state.right;
  };
  const next = (run, by) => { // the run shown after this one, those that are switched off passed over
    for (let step = 1; step <= runs.length; step += 1) {
      const other = (run + by * step + runs.length * step) % runs.length;
      if (!state.hidden.has(other)) return other;
    }
    return run;
  };
  const change = (changes) => {
    state = { ...state, ...changes };
    show();
    redraw();
  };
  for (const view of VIEWS) {
    find(`view-${view}`).addEventListener("change", () => change({ view }));
    find(`view-${view}`).addEventListener("click", (event) => { // a pointer's click leaves the arrow keys to the runs
      if (event.detail > 0) event.target.blur();
    });
  }
  for (const name of ["run", "run-slider"]) {
    find(name).addEventListener("input", (event) => change({ run: Number(event.target.value) }));
  }
  for (const side of ["left", "right"]) {
    find(side).addEventListener("input", (event) => change({ [side]: Number(event.target.value) }));
  }
  find("wipe").addEventListener("input", (event) => grid.style.setProperty("--wipe", `${event.target.value}%`));
  for (const name of ["search", "sort", "figure", "only", "least"]) find(name).addEventListener("input", redraw);
  find("clear").addEventListener("click", () => {
    for (const [name, value] of [["search", ""], ["least", ""], ["sort", "given"], ["only", "all"]]) find(name).value = value;
    redraw();
    find("search").focus();
  });
  document.addEventListener("runs", (event) => {
    state.hidden = event.detail;
    if (state.view === "side") refresh();
    else if (state.view === "one" && state.hidden.has(state.run)) change({ run: next(state.run, 1) });
  });

  // What a picture is worth: all its figures, while the pointer or the focus is on it

  const table = (run, pair) =>
    figures.map((name, place) => make("div", {}, make("dt", {}, name), make("dd", {}, written(figure(run, pair, place)))));
  const tell = (element) => {
    const [run, pair] = [Number(element.dataset.run), Number(element.dataset.pair)];
    tip.replaceChildren(make("strong", {}, keyOf(run), runs[run]), make("dl", {}, ...table(run, pair)));
    tip.hidden = false;
    const box = element.getBoundingClientRect();
    const left = Math.min(Math.max(box.left, 8), innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)}px`;
  };
  const hush = () => { tip.hidden = true; };
  for (const [start, end] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
    grid.addEventListener(start, (event) => {
      const element = event.target.closest(".shot");
      if (element && (start === "mouseover" || element.matches(":focus-visible"))) tell(element);
    });
    grid.addEventListener(end, hush);
  }
  addEventListener("scroll", hush, { passive: true });

  // One sample, large

  const fill = () => {
    const [run, pair] = open;
    find("dialog-title").textContent = promptOf(pair);
    find("dialog-picture").replaceChildren(picture(run, pair));
    find("dialog-run").replaceChildren(keyOf(run), `${runs[run]}, seed ${pairs[pair][1]}`);
    find("dialog-figures").replaceChildren(...table(run, pair));
  };
  const step = (runsOn, pairsOn) => {
    const [run, pair] = open;
    const place = order.indexOf(pair) + pairsOn;
    open = [runsOn ? next(run, runsOn) : run, order[Math.min(Math.max(place, 0), order.length - 1)]];
    fill();
  };
  grid.addEventListener("click", (event) => {
    const element = event.target.closest(".shot");
    if (!element) return;
    hush();
    open = [Number(element.dataset.run), Number(element.dataset.pair)];
    from = element;
    fill();
    dialog.showModal();
  });
  dialog.addEventListener("close", () => from?.focus({ preventScroll: true }));
  find("close").addEventListener("click", () => dialog.close());
  for (const [name, ...by] of [["before-run", -1, 0], ["next-run", 1, 0], ["before-sample", 0, -1], ["next-sample", 0, 1]]) {
    find(name).addEventListener("click", () => step(...by));
  }

  // Keys

  const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (dialog.open) {
      if (!KEYS[event.key]) return;
      event.preventDefault();
      step(...KEYS[event.key]);
      return;
    }
    const radio = event.target.type === "radio";
    if (!radio && event.target.closest("input, select, textarea, summary, .scroll")) return;
    if (event.key === "Escape") hush();
    if (event.key === "/") {
      event.preventDefault();
      find("search").focus();
    } else if (event.key === "v") {
      change({ view: VIEWS[(VIEWS.indexOf(state.view) + 1) % VIEWS.length] });
    } else if (state.view === "one" && !radio && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
      event.preventDefault();
      change({ run: next(state.run, KEYS[event.key][0]) });
    }
  });

  show();
  redraw();
  near.observe(sentinel);
})();
