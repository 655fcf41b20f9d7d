// For keyboards and screen readers: a name for the search, and tables, code and formulas that scroll by the arrow keys.
addEventListener("load", () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  for (const box of document.querySelectorAll(".md-typeset :is(.md-typeset__scrollwrap, pre > code, div:has(> math))"))
    if (box.matches(".md-typeset__scrollwrap") || box.scrollWidth > box.clientWidth) box.tabIndex = 0;
});
