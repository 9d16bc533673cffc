// Sort a table by the column whose heading is pressed; press again for the other order. Empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "descending" || !heading.classList.contains("number");
      const order = heading.getAttribute("aria-sort") === "ascending" ? -1 : down ? 1 : -1;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.sort;
      const compare = (a, b) => {
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        const gap = heading.classList.contains("number") ? key(a) - key(b) : key(a).localeCompare(key(b));
        return order * gap;
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(compare));
    });
  });
}
