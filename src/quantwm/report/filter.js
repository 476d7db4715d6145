// Shows what the chosen tasks, methods and widths leave. The choice is kept in the address:
// #task=wall&method=gptq,awq&width=W4. Without this script everything is shown.
(() => {
  const form = document.getElementById("filter");
  const boxes = [...form.querySelectorAll("input")];
  const keys = [...new Set(boxes.map((box) => box.name))];
  const marked = [...document.querySelectorAll(keys.map((key) => `main [data-${key}]`).join())];
  const groups = [...document.querySelectorAll("main [data-group]")].reverse(); // inner ones first
  const links = [...document.querySelectorAll(".contents a")];
  const rows = [...document.querySelectorAll("main [data-arm]")];
  const members = new Map(
    groups.map((group) => [group, [...group.querySelectorAll("[data-method], [data-width]")]]),
  );
  const hide = (element, hidden) => element.toggleAttribute("hidden", hidden);
  const gone = (element) => element.closest("[hidden]") !== null;
  const arms = (of) => new Set(of.map((row) => row.dataset.arm)).size;

  const chosen = () =>
    keys
      .map((key) => [key, boxes.filter((b) => b.name === key && b.checked).map((b) => b.value)])
      .filter(([, values]) => values.length);

  const apply = () => {
    const now = chosen();
    for (const group of groups) hide(group, false);
    for (const element of marked)
      hide(
        element,
        now.some(([key, values]) => {
          const value = element.getAttribute(`data-${key}`);
          return value !== null && !values.includes(value);
        }),
      );
    // A table, figure or section goes with the last of what it holds.
    for (const group of groups) {
      const inside = members.get(group);
      if (inside.length && inside.every(gone)) hide(group, true);
    }
    for (const link of links) hide(link.parentElement, gone(document.getElementById(link.hash.slice(1))));
    const shown = arms(rows.filter((row) => !gone(row)));
    const all = arms(rows);
    form.querySelector("output").textContent = shown === all ? `all ${all} arms` : `${shown} of ${all} arms`;
    form.querySelector("button").hidden = !now.length;
  };

  const read = () => {
    if (!location.hash.includes("=")) return; // a link to a section leaves the choice alone
    const wanted = location.hash.slice(1).split("&").map((part) => part.split("="));
    const given = new Map(wanted.map(([key, values = ""]) => [key, values.split(",").map(decoded)]));
    for (const box of boxes) box.checked = (given.get(box.name) ?? []).includes(box.value);
    apply();
  };
  const decoded = (text) => {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  };
  const write = () => {
    const parts = chosen().map(([key, values]) => `${key}=${values.map(encodeURIComponent).join()}`);
    history.replaceState(null, "", `#${parts.join("&")}`);
    apply();
  };

  form.addEventListener("change", write);
  form.addEventListener("reset", () => setTimeout(write));
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", read);
  hide(form, false);
  apply();
  read();
})();
