// Charts of the images shown, and the list of errors.

function tableOf(head, rows) {
  const line = (kind, cells) => make("tr", {}, ...cells.map((cell) => make(kind, {}, cell)));
  const table = make("table", {}, line("th", head), ...rows.map((cells) => line("td", cells)));
  return make("details", {}, make("summary", {}, "As a table"), table);
}

function histogram(title, values, highest, format) {
  const figure = make("figure", {}, make("figcaption", {}, title));
  if (!values.length) {
    figure.append(make("p", {}, "No image here has a label among the teacher's classes."));
    return figure;
  }
  const bins = 20;
  const counts = new Array(bins).fill(0);
  for (const value of values) {
    counts[Math.min(bins - 1, Math.floor((value / highest) * bins))] += 1;
  }
  const sorted = [...values].sort((a, b) => a - b);
  const at = (fraction) => sorted[Math.round(fraction * (sorted.length - 1))];
  const text =
    `Median ${format(at(0.5))}; 10% of the images are at or below ${format(at(0.1))}, ` +
    `10% at or above ${format(at(0.9))}.`;
  const [width, height, most] = [320, 96, Math.max(...counts)];
  const bars = counts.map((count, bin) => {
    const size = (height * count) / most;
    const x = 2 + (bin * (width - 4)) / bins;
    return drawn("rect", { x, y: height - size, width: (width - 4) / bins - 2, height: size });
  });
  const labels = [0, 0.5, 1].map((fraction) =>
    drawn(
      "text",
      {
        x: 2 + fraction * (width - 4),
        y: height + 18,
        "text-anchor": ["start", "middle", "end"][2 * fraction],
      },
      format(fraction * highest),
    ),
  );
  const axis = drawn("line", { x1: 0, x2: width, y1: height, y2: height });
  const label = `Histogram of ${values.length} images: ${title}. ${text}`;
  const box = `0 0 ${width} ${height + 24}`;
  figure.append(
    drawn("svg", { viewBox: box, role: "img", "aria-label": label }, ...bars, axis, ...labels),
    make("p", {}, text),
    tableOf(
      ["from", "to", "images"],
      counts.map((count, bin) => [
        format((bin * highest) / bins),
        format(((bin + 1) * highest) / bins),
        whole(count),
      ]),
    ),
  );
  return figure;
}

function frequentClasses() {
  const counts = new Map();
  let patches = 0;
  for (const image of data.images) {
    const { names } = data.splits[image.split];
    image.map.mass.forEach((_, patch) => {
      const name = names[image.map.top(patch)];
      counts.set(name, (counts.get(name) || 0) + 1);
    });
    patches += image.map.mass.length;
  }
  const first = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 8);
  const list = make("ul", { className: "bars" });
  for (const [name, count] of first) {
    const button = make("button", { type: "button", title: `Search for ${name}` }, name);
    button.addEventListener("click", () => {
      $("search").value = name;
      refresh();
      $("search").scrollIntoView({ block: "center" });
    });
    const width = (100 * count) / first[0][1];
    const bar = drawn("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
    bar.append(drawn("rect", { width, height: 8 }));
    list.append(make("li", {}, button, bar, make("span", {}, percent(count / patches))));
  }
  const caption = make("figcaption", {}, "Most frequent classes of patches");
  return make("figure", {}, caption, list);
}

function showSummary() {
  const shown = data.images.length;
  const choice = data.picked ? ", chosen by name" : ", evenly spaced";
  const basis =
    `${whole(shown)} of ${whole(data.total)} images with a map` +
    (shown < data.total ? choice : "");
  const teachers = data.splits.map((split) => {
    const [height, width] = split.grid;
    return (
      `${split.name}: teacher ${split.teacher}, ${height} × ${width} patches, ` +
      `top ${split.k} of ${whole(split.numClasses)} classes`
    );
  });
  $("about").textContent = [basis, ...teachers].join(". ");
  const values = (name) => data.images.map((image) => image[name]).filter((v) => v !== null);
  const most = Math.log(Math.max(...data.splits.map((split) => split.numClasses), 2));
  const plain = (value) => value.toFixed(2);
  $("charts").append(
    histogram("Top-k mass of an image", values("mass"), 1, plain),
    histogram("Patches with the label on top", values("agreement"), 1, (v) => `${Math.round(100 * v)}%`),
    histogram("Entropy of an image, in nats", values("entropy"), most, plain),
    frequentClasses(),
  );
  if (!data.errors.length) return;
  $("failures").hidden = false;
  const images = `${whole(data.failed)} image${data.failed === 1 ? "" : "s"}`;
  $("failures-title").textContent = `Errors: ${images} without a map, or unreadable`;
  for (const { split, key, error } of data.errors) {
    const name = make("bdi", {}, `${data.splits[split].name}/${key}`);
    $("failure-list").append(make("li", {}, name, ": ", make("span", {}, error)));
  }
  if (data.failed > data.errors.length) {
    const more = whole(data.failed - data.errors.length);
    $("failure-list").append(make("li", {}, `and ${more} more`));
  }
}
