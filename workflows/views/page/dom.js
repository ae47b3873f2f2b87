// Building the page's elements. Texts only ever become text nodes: nothing that a run says is read as HTML.

/** h("p.note", {title: "..."}, "text", child, [more]) -> element. `on*` properties are listeners. */
export function h(selector, properties, ...children) {
  const [tag, ...classes] = selector.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  assign(element, properties);
  element.append(...flat(children));
  return element;
}

/** The same for SVG. */
export function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  element.append(...flat(children));
  return element;
}

export function replace(element, ...children) {
  element.replaceChildren(...flat(children));
  return element;
}

/** Set a text only where it changed: screen readers and selections stay undisturbed. */
export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

function assign(element, properties) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
}

function flat(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false && child !== "");
}
