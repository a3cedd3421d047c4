"use strict";
// Fetches the page again while something may change, and puts its main part in place of the one that is shown.
(() => {
  async function refresh() {
    const shown = document.querySelector("main[data-live]");
    const seconds = Number(shown.dataset.live);
    if (!seconds) return;
    await new Promise((done) => setTimeout(done, seconds * 1000));
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (answer.ok) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        const fresh = page.querySelector("main[data-live]");
        const ended = fresh.dataset.live === "0" && document.querySelector(".plot-data") === null;
        shown.replaceWith(document.adoptNode(fresh));
        if (ended && page.querySelector(".plot-data")) location.reload();
      }
    } catch (error) {
      console.warn("the service is away", error); // it is asked again
    }
    refresh();
  }
  if (document.querySelector("main[data-live]")) refresh();
})();
