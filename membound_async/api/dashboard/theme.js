// Light, dark, or what the system says. Runs before the first paint, so that the page never
// flashes in the wrong colours.
"use strict";

{
  const root = document.documentElement;

  const kept = () => {
    try {
      return localStorage.getItem("membound-theme");
    } catch {
      return null; // storage is forbidden here: the choice lasts as long as the page
    }
  };

  const apply = (theme) => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
  };

  apply(kept());

  document.addEventListener("DOMContentLoaded", () => {
    const theme = root.dataset.theme ?? "system";
    document.querySelector(`#theme input[value="${theme}"]`).checked = true;
    document.getElementById("theme").addEventListener("change", (event) => {
      apply(event.target.value);
      try {
        localStorage.setItem("membound-theme", event.target.value);
      } catch {
        // as above
      }
      document.dispatchEvent(new Event("themechange"));
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      document.dispatchEvent(new Event("themechange"));
    });
  });
}
