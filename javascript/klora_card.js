"use strict";

/* The card above the map: what the two files are, whether they fit, and what to do if they don't. */
(function(klora) {
    const element = (...args) => klora.element(...args);
    const ROLES = {subject: "Subject", style: "Style"};
    const ENCODERS = {te1: "CLIP-L", te2: "CLIP-G", t5: "T5"};

    function facts(file) {
        const counted = ([name, count]) => `${ENCODERS[name] || name} ${count}`;
        const encoders = Object.entries(file.textEncoders).map(counted).join(", ") || "none";
        const unknown = file.unknown ? `; ${file.unknown} unknown tensors` : "";
        return [
            ["format", `${file.kinds}, ${file.dialect} keys`],
            ["rank", `${file.rank}, network alpha ${file.networkAlpha}`],
            ["layers", `${file.layers}; text encoders: ${encoders}${unknown}`],
        ];
    }

    function thumbnail(file) {
        const empty = element("div", {class: "klora-thumb klora-thumb-empty", "aria-hidden": "true"});
        if (!file.preview) return empty;
        const alt = `Preview of ${file.name}`;
        const image = element("img", {class: "klora-thumb", src: file.preview, alt, loading: "lazy"});
        image.addEventListener("error", () => image.replaceWith(empty));
        return image;
    }

    function words(file, prompt) {
        if (!file.words.length) {
            return element("p", {class: "klora-words klora-faint"}, "no trigger words in the file");
        }
        const button = (more, title, text, added) => {
            const made = element("button", {type: "button", class: `klora-word${more}`, title}, text);
            made.addEventListener("click", () => prompt.add(added));
            return made;
        };
        const chips = file.words.map(word => {
            const chip = button("", "Add this trigger word to the prompt", word, [word]);
            chip.dataset.word = word;
            return chip;
        });
        const all = button(" klora-all", "Add all trigger words to the prompt", "add all", file.words);
        const label = element("span", {class: "klora-faint"}, "trigger words");
        return element("div", {class: "klora-words"}, label, ...chips, file.words.length > 1 ? all : null);
    }

    function filePane(role, file, prompt) {
        const name = [
            element("span", {class: "klora-role"}, ROLES[role]),
            element("b", {}, file ? file.name : "not chosen yet"),
        ];
        const pane = (...body) => element("section", {class: `klora-file klora-of-${role}`}, ...body);
        const nameAlone = () => element("header", {}, element("div", {}, ...name));
        const sentence = (kind, text) => element("p", {class: `klora-${kind}`}, text);
        if (!file) return pane(nameAlone(), sentence("faint", `Choose a ${role} LoRA above.`));
        if (file.problem) return pane(nameAlone(), sentence("problem", file.problem));
        const trainedOn = () => element("span", {class: "klora-faint"}, `trained on ${file.trainedOn}`);
        const origin = [element("span", {}, file.base), file.trainedOn ? trainedOn() : null];
        const entry = ([term, value]) => [element("dt", {}, term), element("dd", {}, value)];
        const list = element("dl", {}, ...facts(file).flatMap(entry));
        const header = element("header", {}, thumbnail(file), element("div", {}, ...name, ...origin));
        return pane(header, list, words(file, prompt));
    }

    function tile(name, value, note, extra) {
        const faint = text => element("span", {class: "klora-faint"}, text);
        const parts = [faint(name), element("b", {}, value), faint(note), extra];
        return element("div", {class: "klora-tile"}, ...parts);
    }

    function shareBar(share) {
        const filled = element("i", {class: "klora-subject"});
        filled.style.width = `${share * 100}%`;
        return element("span", {class: "klora-bar klora-style", "aria-hidden": "true"}, filled);
    }

    /** What is known about the pair; gamma and share are null until it is scored. */
    function tiles({layers, checkpoint}, gamma, share) {
        if (!layers) return [];
        const roles = ["subject", "style"].filter(role => layers[role]);
        const only = roles.map(role => `${layers[role]} only in the ${role}`).join(", ");
        return [
            tile("layers both change", String(layers.shared), only || "none in only one file"),
            tile("γ", gamma === null ? "…" : klora.short(gamma), "balance of the two"),
            share === null ? tile("subject's share", "…", "of layers and steps", null)
                : tile("subject's share", klora.percent(share), "of layers and steps", shareBar(share)),
            checkpoint ? tile("checkpoint", checkpoint.base || "of another kind", checkpoint.name)
                : tile("checkpoint", "not loaded", "shown once it is loaded"),
        ];
    }

    function offer(advice, preset) {
        const title = "Sets the schedule to S* and β to auto";
        const button = element("button", {type: "button", class: "klora-choice", title}, "use S*");
        button.addEventListener("click", preset);
        return element("p", {class: "klora-offer"}, advice, button);
    }

    /**
     * The card as elements.
     * @param card the answer of /klora/internal/card
     * @param more {gamma, share, warnings, problem, offered} of the pair, null or empty until it is scored;
     *     `offered` says whether to offer the preset
     * @param prompt {add(words)}
     * @param preset function that sets the controls to what is recommended for such LoRAs
     */
    function drawCard(card, more, prompt, preset) {
        const problems = [...card.problems, ...(more.problem ? [more.problem] : [])];
        const panes = Object.keys(ROLES).map(role => filePane(role, card[role], prompt));
        return element("div", {class: "klora-card"},
            element("div", {class: "klora-files"}, ...panes),
            element("div", {class: "klora-tiles"}, ...tiles(card, more.gamma, more.share)),
            more.offered ? offer(card.subject.advice, preset) : null,
            ...problems.map(sentence => element("p", {class: "klora-problem", role: "alert"}, sentence)),
            ...more.warnings.map(sentence => element("p", {class: "klora-warning"}, sentence)));
    }

    Object.assign(klora, {drawCard});
})(globalThis.klora = globalThis.klora || {});
