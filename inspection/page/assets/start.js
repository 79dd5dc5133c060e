// Addresses, keys and pointers, light and dark; then the page starts.

function step(distance) {
  if (!order.length) return;
  const number = order.indexOf(open);
  const next = number < 0 ? 0 : (number + distance + order.length) % order.length;
  history.replaceState(null, "", hashOf(order[next]));
  showImage(order[next]);
}

/** Show what the address names: an image, or the gallery. */
function route() {
  let id = "";
  try {
    id = decodeURIComponent(location.hash.slice(1));
  } catch {
    // not one of our links
  }
  const image = data.images.find((candidate) => candidate.id === id);
  if (image) showImage(image);
  else if (viewer.open) viewer.close();
}

function closed() {
  const image = open;
  open = null;
  document.title = "Label maps";
  if (location.hash.length > 1) history.replaceState(null, "", "#");
  const number = order.indexOf(image);
  if (number < 0) return;
  reach(number);
  image.link.focus();
}

// Not pointerover: that also comes when a new image appears under a pointer at rest.
$("grid").addEventListener("pointermove", (event) => {
  const cell = event.target.closest(".cell");
  if (cell && Number(cell.dataset.patch) !== here) goTo(Number(cell.dataset.patch));
});
$("grid").addEventListener("click", (event) => {
  const cell = event.target.closest(".cell");
  if (cell) goTo(Number(cell.dataset.patch), true);
});
$("grid").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const [height, width] = data.splits[open.split].grid;
  const [row, column] = [Math.floor(here / width), here % width];
  const target = {
    ArrowRight: [row, column + 1],
    ArrowLeft: [row, column - 1],
    ArrowDown: [row + 1, column],
    ArrowUp: [row - 1, column],
    Home: [row, 0],
    End: [row, width - 1],
  }[event.key];
  if (!target) return;
  event.preventDefault();
  const [y, x] = target;
  if (y >= 0 && y < height && x >= 0 && x < width) goTo(y * width + x, true);
});
viewer.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const key = event.key.toLowerCase();
  if (key === "n") step(1);
  else if (key === "p") step(-1);
  else if (key === "o") {
    const now = document.querySelector("input[name=overlay]:checked").value;
    const wanted = now === "none" ? "classes" : "none";
    document.querySelector(`input[name=overlay][value=${wanted}]`).checked = true;
    paint();
  }
});
viewer.addEventListener("close", closed);
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => viewer.close());
$("controls").addEventListener("input", paint);
addEventListener("resize", layOut);
addEventListener("hashchange", route);

const preference = matchMedia("(prefers-color-scheme: dark)");

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("dark").setAttribute("aria-pressed", String(dark));
}

theme(preference.matches);
preference.addEventListener("change", () => theme(preference.matches));
$("dark").addEventListener("click", () => theme($("dark").getAttribute("aria-pressed") !== "true"));

const ramp = $("ramp").getContext("2d");
for (let x = 0; x < 256; x += 1) {
  ramp.fillStyle = shade(x / 255);
  ramp.fillRect(x, 0, 1, 1);
}

$("summary").open = !matchMedia("(max-width: 760px)").matches;
showSummary();
refresh();
route();
