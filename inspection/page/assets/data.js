"use strict";
// Names of files and classes are hostile input: they only ever go into text nodes and attributes
// that hold text. The page's policy (require-trusted-types-for) refuses anything else.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const percent = (p) => (p < 0.0005 ? "<0.1%" : `${(100 * p).toFixed(1)}%`);
const whole = (n) => n.toLocaleString("en");

/** An element with properties, attributes (where the name has a dash or is role) and children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function drawn(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

for (const split of data.splits) {
  const names = split.classes.map(([, name]) => name);
  // ImageNet has two cranes: a name that occurs twice gets its number.
  const twice = new Set(names.filter((name, index) => names.indexOf(name) !== index));
  split.names = split.classes.map(([id, name]) => (twice.has(name) ? `${name} (${id})` : name));
}

/** Little-endian 16-bit numbers in base64. */
function numbers(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}

/** The map of an image: classes on top of patch i, best first, as [[index, probability], …].
 * Indices are into the names of its split. */
function mapOf(image) {
  if (image.map) return image.map;
  const { listed } = data.splits[image.split];
  const ranks = numbers(image.ranks);
  const probs = numbers(image.probs);
  image.map = {
    mass: Array.from(numbers(image.masses), (step) => step / 65535),
    top: (patch, rank = 0) => image.classes[ranks[patch * listed + rank]],
    // Probability 0: no class is stored.
    patch: (patch) =>
      Array.from({ length: listed }, (_, rank) => [
        image.classes[ranks[patch * listed + rank]],
        probs[patch * listed + rank] / 65535,
      ]).filter(([, chance]) => chance > 0),
  };
  return image.map;
}

for (const image of data.images) {
  const split = data.splits[image.split];
  image.id = `${split.name}/${image.key}`;
  image.labelName = image.label >= 0 ? split.names[image.label] : "";
  const seen = [image.seen, ...image.legend].map((index) => split.names[index]);
  image.words = [image.id, image.labelName, ...seen].join("\n").toLowerCase();
}
