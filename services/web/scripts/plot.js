"use strict";
(() => {
  const space = { left: 70, right: 20, top: 12, bottom: 46, width: 900, height: 480 };

  function element(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function sized(bytes) {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let unit = 0;
    while (bytes >= 1000 && unit < 4) { bytes /= 1000; unit += 1; }
    return Number(bytes.toPrecision(3)) + " " + units[unit];
  }

  function scale(values, low, high, log) {
    const map = log ? Math.log10 : (value) => value;
    let first = map(Math.min(...values)), last = map(Math.max(...values));
    const margin = (last - first || Math.abs(first) || 1) * 0.06;
    first -= margin; last += margin;
    return {
      place: (value) => low + (map(value) - first) / (last - first) * (high - low),
      ticks: [0, 0.25, 0.5, 0.75, 1].map((part) => {
        const value = first + part * (last - first);
        return log ? 10 ** value : value;
      }),
    };
  }

  function draw(box, data) {
    const svg = box.querySelector("svg"), note = box.querySelector(".note"), legend = box.querySelector(".legend");
    const names = [...new Set(data.points.map((point) => point.candidate))];
    const color = (name) => data.colors[names.indexOf(name) % data.colors.length];
    const hidden = new Set();
    if (!data.points.length) { note.textContent = "no measured variants yet"; return; }
    // One ruined variant would flatten all others: what lies far above the median is drawn at the edge.
    const sorted = data.points.map((point) => point.value).sort((a, b) => a - b);
    const ceiling = data.higher ? Infinity : sorted[Math.floor(sorted.length / 2)] * 6;
    const shown = (point) => Math.min(point.value, ceiling);
    const x = scale(data.points.map((point) => point.bytes), space.left, space.width - space.right, true);
    const wide = Math.max(...data.points.map(shown)) / Math.min(...data.points.map(shown)) > 2.5 && sorted[0] > 0;
    const y = scale(data.points.map(shown), space.height - space.bottom, space.top, wide);

    function axes() {
      for (const tick of y.ticks) {
        const at = y.place(tick);
        svg.append(element("line", { x1: space.left, x2: space.width - space.right, y1: at, y2: at, stroke: "#8884" }));
        svg.append(element("text", { x: space.left - 8, y: at + 4, "text-anchor": "end" }, tick.toPrecision(3)));
      }
      for (const tick of x.ticks) {
        svg.append(element("text", { x: x.place(tick), y: space.height - 26, "text-anchor": "middle" }, sized(tick)));
      }
      svg.append(element("text", { x: 480, y: space.height - 6, "text-anchor": "middle" }, "size of the compact file"));
      svg.append(element("text", { x: 14, y: 230, transform: "rotate(-90 14 230)", "text-anchor": "middle" }, data.metric));
    }

    function tell(point) {
      note.textContent = `${point.name}: ${point.size}, ${data.metric} ${point.value.toPrecision(5)}, `
        + `${point.bits} bits per parameter, ${Math.round(point.sparsity * 100)} % sparse`
        + (point.frontier ? ", on the frontier" : "");
    }

    function paint() {
      svg.replaceChildren();
      axes();
      const line = data.points.filter((point) => point.frontier && !hidden.has(point.candidate));
      const path = line.map((point, index) => {
        const to = `${x.place(point.bytes)} ${y.place(shown(point))}`;
        return index ? `H ${x.place(point.bytes)} L ${to}` : `M ${to}`;
      }).join(" ");
      svg.append(element("path", { d: path, fill: "none", stroke: "#888", "stroke-width": 1.4 }));
      for (const point of data.points) {
        if (hidden.has(point.candidate)) continue;
        const dot = element("circle", {
          cx: x.place(point.bytes), cy: y.place(shown(point)), r: 6, tabindex: 0, stroke: color(point.candidate),
          "stroke-width": 2, fill: point.frontier ? color(point.candidate) : "transparent",
        });
        dot.append(element("title", {}, point.name));
        for (const kind of ["mouseenter", "focus", "click"]) dot.addEventListener(kind, () => tell(point));
        svg.append(dot);
      }
    }

    for (const name of names) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "● " + name;
      button.style.color = color(name);
      button.addEventListener("click", () => {
        hidden.has(name) ? hidden.delete(name) : hidden.add(name);
        button.classList.toggle("off", hidden.has(name));
        paint();
      });
      legend.append(button);
    }
    paint();
  }

  document.querySelectorAll("[data-plot]").forEach((box) => {
    draw(box, JSON.parse(box.parentElement.querySelector(".plot-data").textContent));
  });
})();
