// Cards that can be searched, sorted and walked through with the arrow keys.

let order = []; // images as the gallery shows them
let current = 0; // the one that Tab reaches

const hashOf = (image) => `#${image.id.split("/").map(encodeURIComponent).join("/")}`;

for (const image of data.images) {
  const { names } = data.splits[image.split];
  const seen = names[image.seen];
  const label = image.label >= 0 ? image.labelName : "label unknown";
  const wrong = image.label >= 0 && image.seen !== image.label;
  const numbersText =
    (image.agreement === null ? "" : `agrees ${Math.round(100 * image.agreement)}% · `) +
    `mass ${image.mass.toFixed(2)}`;
  const text = make(
    "div",
    {},
    make("p", { className: "label", title: label }, label),
    make("p", { className: "name", title: image.id }, image.key.split("/").at(-1)),
    make("p", { className: "numbers" }, numbersText),
  );
  if (wrong || image.label < 0) {
    const kind = wrong ? "warn" : "numbers";
    text.append(make("p", { className: kind, title: seen }, `seen as ${seen}`));
  }
  const thumbnail = make("img", { src: image.src, alt: "", decoding: "async", loading: "lazy" });
  const properties = { className: "card", href: hashOf(image), tabIndex: -1 };
  image.link = make("a", properties, thumbnail, text);
  image.card = make("li", {}, image.link);
}

function refresh() {
  const terms = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const by = $("sort").value;
  const direction = { suspicion: -1, entropy: -1, agreement: 1, mass: 1 }[by];
  order = data.images.filter((image) => terms.every((term) => image.words.includes(term)));
  if (by === "key") order.sort((a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : 0));
  else {
    const value = (image) => (image[by] === null ? Infinity : direction * image[by]);
    order.sort((a, b) => (value(a) === value(b) ? 0 : value(a) - value(b)));
  }
  $("gallery").replaceChildren(...order.map((image) => image.card));
  $("count").textContent = `${whole(order.length)} of ${whole(data.images.length)} images`;
  reach(0);
}

/** Make one card the gallery's stop for Tab. */
function reach(number) {
  for (const { link } of data.images) link.tabIndex = -1;
  current = number;
  if (order[current]) order[current].link.tabIndex = 0;
}

function columns() {
  const tops = order.map((image) => image.card.offsetTop);
  const next = tops.findIndex((top) => top !== tops[0]);
  return next < 0 ? tops.length : next;
}

$("gallery").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const steps = {
    ArrowRight: () => current + 1,
    ArrowLeft: () => current - 1,
    ArrowDown: () => current + columns(),
    ArrowUp: () => current - columns(),
    Home: () => 0,
    End: () => order.length - 1,
  };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const number = steps[event.key]();
  if (number < 0 || number >= order.length) return;
  reach(number);
  order[number].link.focus();
});
$("gallery").addEventListener("focusin", (event) => {
  const number = order.findIndex((image) => image.link === event.target);
  if (number >= 0) reach(number);
});
$("search").addEventListener("input", refresh);
$("sort").addEventListener("change", refresh);
