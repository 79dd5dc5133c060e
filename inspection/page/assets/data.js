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

/** The map of an image; classes are indices into the names of its split. */
function mapOf({ split, classes, ranks, probs, masses }) {
  const { listed } = data.splits[split];
  const [places, chances] = [numbers(ranks), numbers(probs)];
  const at = (i) => [classes[places[i]], chances[i] / 65535];
  return {
    mass: Array.from(numbers(masses), (step) => step / 65535),
    top: (patch) => at(patch * listed)[0],
    /** The classes of a patch, best first, as [[index, probability], …]; 0: none is stored. */
    patch: (patch) =>
      Array.from({ length: listed }, (_, rank) => at(patch * listed + rank)).filter(([, p]) => p > 0),
  };
}

for (const image of data.images) {
  const split = data.splits[image.split];
  image.map = mapOf(image);
  image.id = `${split.name}/${image.key}`;
  image.labelName = image.label >= 0 ? split.names[image.label] : "";
  const seen = [image.seen, ...image.legend].map((index) => split.names[index]);
  image.words = [image.id, image.labelName, ...seen].join("\n").toLowerCase();
}
