"use strict";
// Formulas are written as $...$ and $$...$$; arithmatex marks them, KaTeX sets them.
document.addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".arithmatex")) {
    katex.render(place.textContent.trim().slice(2, -2), place, { displayMode: place.tagName === "DIV", throwOnError: false });
  }
});
