// What the viewer shows of the patches, and at which size.

/** Colour the cells as the controls are set. */
function paint() {
  if (!open) return;
  const kind = document.querySelector("input[name=overlay]:checked").value;
  const { map } = open;
  const lit = highlighted !== null;
  const grid = $("grid");
  grid.classList.toggle("lit", lit);
  grid.style.setProperty("--opacity", kind === "none" ? 0 : $("opacity").value / 100);
  Array.from(cells()).forEach((cell, patch) => {
    const index = map.top(patch);
    const [fill, letter] = cell.children;
    fill.style.background = kind === "mass" ? shade(map.mass[patch]) : colourOf(open, index);
    letter.hidden = kind !== "classes" && !lit;
    cell.classList.toggle("match", index === highlighted);
  });
  $("frame").classList.toggle("grey", kind === "mass" && !lit);
  $("scale").hidden = kind !== "mass";
  for (const button of $("legend").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.index) === highlighted));
  }
}

/** As large as the window allows, in the image's own shape. */
function layOut() {
  if (!open) return;
  const [width, height] = open.size;
  const narrow = matchMedia("(max-width: 760px)").matches;
  const stage = document.querySelector(".stage").clientWidth;
  const room = narrow ? innerHeight * 0.55 : innerHeight - 90;
  const scale = Math.min(stage / width, Math.max(room, 160) / height);
  const frame = $("frame");
  frame.style.width = `${Math.max(Math.round(width * scale), 1)}px`;
  frame.style.height = `${Math.max(Math.round(height * scale), 1)}px`;
  const [rows, columns_] = data.splits[open.split].grid;
  const side = Math.min($("grid").clientWidth / columns_, $("grid").clientHeight / rows);
  $("grid").style.setProperty("--letter", side < 11 ? "0" : `${Math.min(side * 0.55, 26)}px`);
}

/** Show a patch's classes, and make it the grid's stop for Tab. */
function goTo(patch, focus = false) {
  const split = data.splits[open.split];
  const [, width] = split.grid;
  for (const cell of $("grid").querySelectorAll(".here")) {
    cell.classList.remove("here");
    cell.tabIndex = -1;
  }
  here = patch;
  const cell = cells()[patch];
  cell.classList.add("here");
  cell.tabIndex = 0;
  if (focus) cell.focus({ preventScroll: true });
  $("patch-title").textContent =
    `Patch in row ${Math.floor(patch / width) + 1}, column ${(patch % width) + 1}`;
  const best = open.map.patch(patch);
  const lines = best.map(([index, chance]) => {
    const bar = make("i");
    bar.style.width = `${100 * chance}%`;
    return make(
      "li",
      { className: index === open.label ? "truth" : "" },
      bar,
      make("span", {}, split.names[index]),
      make("span", { className: "amount" }, percent(chance)),
    );
  });
  const others = Math.max(1 - best.reduce((sum, [, chance]) => sum + chance, 0), 0);
  const count = split.numClasses - best.length;
  if (count > 0) {
    const text = `${whole(count)} other classes together`;
    lines.push(make("li", {}, make("span", {}, text), make("span", { className: "amount" }, percent(others))));
  }
  $("patch").replaceChildren(...lines);
}
