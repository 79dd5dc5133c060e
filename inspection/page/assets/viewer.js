// One image: its grid of patches, its legend and its facts.

const viewer = $("viewer");
let open = null; // the image in the viewer
let here = 0; // its current patch
let highlighted = null; // index of the class whose patches stand out

function colourOf(image, index) {
  const number = image.legend.indexOf(index);
  return number < 0 ? data.other : data.colours[number];
}

function letterOf(image, index, chance) {
  const number = image.legend.indexOf(index);
  if (number < 0) return "·";
  return chance >= 0.5 ? data.letters[number] : data.letters[number].toLowerCase();
}

/** Viridis, as CSS. */
function shade(value) {
  const position = Math.min(Math.max(value, 0), 1) * (data.viridis.length - 1);
  const low = Math.min(Math.floor(position), data.viridis.length - 2);
  const channel = (colour, i) => parseInt(colour.slice(1 + 2 * i, 3 + 2 * i), 16);
  const mixed = [0, 1, 2].map((i) => {
    const [a, b] = [channel(data.viridis[low], i), channel(data.viridis[low + 1], i)];
    return Math.round(a + (b - a) * (position - low));
  });
  return `rgb(${mixed.join(",")})`;
}

function showImage(image) {
  const split = data.splits[image.split];
  open = image;
  highlighted = null;
  $("title").textContent = image.key;
  $("title").title = image.id;
  $("image").src = image.src;
  $("image").alt = image.labelName ? `Image labelled ${image.labelName}` : "Image";
  $("patch").style.minHeight = `${1.6 * (split.listed + 1)}em`; // nothing below it jumps
  document.title = `${image.key} – label maps`;
  buildGrid(image, split);
  buildLegend(image, split);
  buildFacts(image, split);
  const [height, width] = split.grid;
  if (!viewer.open) viewer.showModal();
  layOut();
  paint();
  goTo(Math.floor(height / 2) * width + Math.floor(width / 2), true);
}

function buildGrid(image, split) {
  const [height, width] = split.grid;
  const [x0, y0, x1, y1] = image.extent;
  const grid = $("grid");
  grid.setAttribute("aria-label", `${height} by ${width} patches`);
  Object.assign(grid.style, {
    left: `${100 * x0}%`,
    top: `${100 * y0}%`,
    width: `${100 * (x1 - x0)}%`,
    height: `${100 * (y1 - y0)}%`,
  });
  const rows = [];
  for (let row = 0; row < height; row += 1) {
    const line = make("div", { role: "row" });
    for (let column = 0; column < width; column += 1) {
      const patch = row * width + column;
      const best = image.map.patch(patch).slice(0, 3);
      const words = best.map(([index, chance]) => `${split.names[index]} ${percent(chance)}`);
      const cell = make("div", {
        className: "cell",
        role: "gridcell",
        tabIndex: -1,
        "aria-label": `row ${row + 1}, column ${column + 1}: ${words.join(", ")}`,
      });
      cell.dataset.patch = patch;
      cell.append(make("i"), make("b", {}, letterOf(image, ...best[0])));
      line.append(cell);
    }
    rows.push(line);
  }
  grid.replaceChildren(...rows);
}

const cells = () => $("grid").getElementsByClassName("cell");

function buildLegend(image, split) {
  const { map } = image;
  const counts = new Map();
  map.mass.forEach((_, patch) => counts.set(map.top(patch), (counts.get(map.top(patch)) || 0) + 1));
  const swatch = (colour, letter) => {
    const box = make("span", { className: "swatch", "aria-hidden": "true" }, letter);
    box.style.background = colour;
    return box;
  };
  const patches = (count) => make("span", { className: "amount" }, `${count} patch${count === 1 ? "" : "es"}`);
  const lines = image.legend.map((index, number) => {
    const name = split.names[index] + (index === image.label ? " (the label)" : "");
    const button = make(
      "button",
      { type: "button", "aria-pressed": "false", title: "Highlight its patches" },
      swatch(data.colours[number], data.letters[number]),
      make("span", {}, name),
      patches(counts.get(index)),
    );
    button.addEventListener("click", () => {
      highlighted = highlighted === index ? null : index;
      paint();
    });
    button.dataset.index = index;
    return make("li", {}, button);
  });
  const named = image.legend.reduce((sum, index) => sum + counts.get(index), 0);
  if (named < map.mass.length) {
    const line = [swatch(data.other, "·"), make("span", {}, `${counts.size - image.legend.length} other classes`)];
    lines.push(make("li", {}, make("span", {}, ...line, patches(map.mass.length - named))));
  }
  $("legend").replaceChildren(...lines);
}

function buildFacts(image, split) {
  const label =
    image.label >= 0
      ? image.labelName
      : image.folderLabel >= 0
        ? `number ${image.folderLabel} of the folders`
        : "unknown";
  const facts = [
    ["label", label],
    ["seen as", `${split.names[image.seen]}, ${percent(image.seen_prob)} on average`],
  ];
  if (image.agreement !== null) {
    facts.push(["label on top", `${percent(image.agreement)} of the patches`]);
    facts.push(["its probability", `${percent(image.label_prob)} on average`]);
  }
  facts.push(
    ["top-k mass", image.mass.toFixed(3)],
    ["entropy", `${image.entropy.toFixed(2)} nats`],
    ["image", `${image.size[0]} × ${image.size[1]} pixels`],
    ["key", image.key],
    ["split", split.name],
  );
  $("facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]),
  );
}
