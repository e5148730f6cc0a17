"use strict";

/* The K-LoRA panel of txt2img and of img2img: asks for the files and scores of a pair once, and draws the rest in the browser. */
(function(klora) {
    const TABS = ["txt2img", "img2img"];
    const DEBOUNCE = 250, TRY_AGAIN = 2500, MOST_PAIRS = 6, MOST_PLANS = 24;
    const panels = {};

    async function ask(route, body, signal) {
        const answer = await fetch(`./klora/internal/${route}`, {
            method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal,
        });
        return answer.ok ? answer.json() : {problem: `The WebUI answered with status ${answer.status}.`, again: false};
    }

    const field = (tab, name) => gradioApp().querySelector(`#${tab}_${name} input[type=number]`);

    /** Number in one of the host's own fields, `otherwise` where there is none. */
    function hostNumber(tab, name, otherwise) {
        const value = parseFloat((field(tab, name) || {}).value);
        return Number.isFinite(value) ? value : otherwise;
    }

    function decoded(name) {
        try {
            return decodeURIComponent(name);
        } catch {
            return name;
        }
    }

    /** The prompt of a tab, to put trigger words into. */
    class Prompt {
        constructor(tab) {
            this.tab = tab;
        }

        get area() {
            return gradioApp().querySelector(`#${this.tab}_prompt textarea`);
        }

        has(word) {
            return this.area.value.toLowerCase().includes(word.toLowerCase());
        }

        add(words) {
            for (const word of words.filter(one => !this.has(one))) {
                const before = this.area.value.replace(/[\s,]+$/, "");
                this.area.value = before ? `${before}, ${word}` : word;
            }
            updateInput(this.area);
        }
    }

    class Panel {
        constructor(tab, root) {
            this.tab = tab;
            this.root = root;
            this.constants = JSON.parse(root.dataset.constants);
            this.values = {...this.constants.defaults};
            this.prompt = new Prompt(tab);
            this.pairs = new Map();
            this.plans = new Map();
            this.wanted = new Map();
            this.lastPlan = null;
            this.card = null;
            this.passes = [];
            this.shown = "planned";
            for (const [name, ...strengths] of [["subject", 1, 0], ["style", 0, 1]]) {
                const {levels} = this.constants;
                root.style.setProperty(`--klora-${name}`, levels[klora.codeOf(levels, ...strengths)].colour);
            }
            this.build();
        }

        build() {
            const {element} = klora;
            this.cardPlace = element("div", {class: "klora-card-place"});
            this.status = element("p", {class: "klora-status", role: "status"});
            this.choices = element("div", {class: "klora-choices", role: "group", "aria-label": "Which map"});
            this.title = element("span", {class: "klora-title"});
            this.widen = element("button", {type: "button", class: "klora-choice", "aria-pressed": "false"}, "layer names");
            this.widen.addEventListener("click", () => {
                this.map.wide = !this.map.wide;
                this.widen.setAttribute("aria-pressed", String(this.map.wide));
                this.map.draw();
            });
            this.map = new klora.SelectionMap(this.constants);
            this.mapPlace = element("div", {class: "klora-map-place", hidden: true},
                element("div", {class: "klora-map-head"}, this.choices, this.title, this.widen), this.map.root);
            this.root.replaceChildren(this.cardPlace, this.status, this.mapPlace);
        }

        get names() {
            const [subject, style] = ["subject", "style"].map(role => {
                const name = String(this.values[role] ?? "").trim();
                return name === "None" ? "" : name;
            });
            return {subject, style};
        }

        get kScale() {
            const read = klora.readNumber(this.values.k_scale, this.constants.numbers.k_scale);
            return read === undefined ? this.constants.defaults.k_scale : read;
        }

        get pairKey() {
            return JSON.stringify([this.names, this.kScale]);
        }

        get pair() {
            const known = this.pairs.get(this.pairKey);
            return known && known.layers ? known : null;
        }

        /** The controls hold other values now, by the user or by a pasted text. */
        changed(values) {
            const before = this.pairKey;
            this.values = values;
            this.shown = "planned";
            if (before !== this.pairKey || !this.card) this.refresh(DEBOUNCE);
            this.redraw();
        }

        /** Ask for the card and then for the scores; whatever was asked before is given up. */
        refresh(delay = 0) {
            clearTimeout(this.timer);
            if (this.asking) this.asking.abort();
            this.asking = null;
            if (!this.names.subject && !this.names.style) {
                this.card = null;
                this.say("");
                this.redraw();
                return;
            }
            this.timer = setTimeout(() => this.load(), delay);
        }

        async load() {
            const asking = this.asking = new AbortController(), {names, kScale, pairKey} = this;
            try {
                const card = await ask("card", names, asking.signal);
                if (asking.signal.aborted) return;
                this.card = card.problem ? {subject: null, style: null, layers: null, checkpoint: null, problems: [card.problem]} : card;
                this.redraw();
                if (card.layers && card.layers.shared && card.subject.base === card.style.base && !this.pairs.has(pairKey)) {
                    this.say("Scoring the pair: once, then it is kept …");
                    await this.score(names, kScale, pairKey, asking);
                }
                this.say("");
            } catch (error) {
                if (error.name === "AbortError") return;
                this.say("The WebUI does not answer: the card is shown when it does.");
                this.refresh(TRY_AGAIN);
            }
        }

        async score(names, kScale, pairKey, asking) {
            for (;;) {
                const found = await ask("scores", {...names, k_scale: kScale}, asking.signal);
                if (asking.signal.aborted) return;
                if (!found.again) {
                    this.pairs.set(pairKey, found);
                    if (this.pairs.size > MOST_PAIRS) this.pairs.delete(this.pairs.keys().next().value);
                    this.redraw();
                    return;
                }
                this.say(found.problem);
                await new Promise(resolve => setTimeout(resolve, TRY_AGAIN));
                if (asking.signal.aborted) return;
            }
        }

        say(sentence) {
            this.status.textContent = sentence;
            this.status.hidden = !sentence;
        }

        /** Draw at the next frame, however often it is asked for until then. */
        redraw() {
            if (this.frame) return;
            this.frame = requestAnimationFrame(() => {
                this.frame = null;
                this.draw();
            });
        }

        draw() {
            this.wanted.clear();
            const plan = this.pair && this.planned();
            this.drawCard(plan);
            const applied = this.applied();
            clearTimeout(this.planTimer);
            if (this.wanted.size && !this.askingPlan) this.planTimer = setTimeout(() => this.loadPlan(), DEBOUNCE);
            if (!applied) this.shown = "planned";
            const view = this.shown === "planned" ? plan : applied;
            this.mapPlace.hidden = !(view && view.rows);
            if (this.mapPlace.hidden) return;
            this.drawChoices(applied);
            this.title.textContent = view.title;
            this.map.show(view);
        }

        drawCard(plan) {
            if (!this.card) {
                this.cardPlace.replaceChildren();
                return;
            }
            const known = this.pairs.get(this.pairKey) || {};
            const shares = plan && plan.rows ? plan.rows.map(row => klora.subjectShare(row, this.constants.levels)).filter(share => share !== null) : [];
            const share = shares.length ? shares.reduce((sum, one) => sum + one, 0) / shares.length : null;
            const problems = [known.problem, plan && plan.problem].filter(Boolean).join(" ");
            const offered = ["subject", "style"].every(role => (this.card[role] || {}).base === "FLUX") && this.values.schedule === "s";
            const more = {gamma: plan && plan.rows ? plan.gamma : known.gamma ?? null, share, warnings: known.warnings || [], problem: problems, offered};
            const drawn = JSON.stringify([this.card, more]);
            if (drawn !== this.drawnCard || !this.cardPlace.firstChild) {
                this.cardPlace.replaceChildren(klora.drawCard(this.card, more, this.prompt, () => this.usePreset()));
                this.drawnCard = drawn;
            }
            this.markWords();
        }

        usePreset() {
            gradioApp().querySelector(`#klora_${this.tab}_preset`).click();
        }

        markWords() {
            for (const chip of this.cardPlace.querySelectorAll("[data-word]")) {
                chip.setAttribute("aria-pressed", String(this.prompt.has(chip.dataset.word)));
            }
        }

        /** Settings of a plan from values by name; {problem} where a number is none. */
        settingsOf(values, steps, seed) {
            const numbers = {};
            for (const name of ["alpha", "beta", "gamma"]) {
                numbers[name] = klora.readNumber(values[name], this.constants.numbers[name]);
                if (numbers[name] === undefined) {
                    const {label, words, bounds} = this.constants.numbers[name];
                    return {problem: `${label} is ${[...words, `a number from ${bounds[0]} to ${bounds[1]}`].join(" or ")}, not “${values[name]}”.`};
                }
            }
            const beta = numbers.beta === "auto" ? this.constants.schedules[values.schedule] : numbers.beta;
            return {method: values.method, schedule: values.schedule, alpha: numbers.alpha, beta, gamma: numbers.gamma, steps, seed};
        }

        /** Steps of the whole schedule, and the first that runs: img2img enters where its noise level stands. */
        course() {
            const steps = Math.max(1, Math.round(hostNumber(this.tab, "steps", 20)));
            if (this.tab !== "img2img") return {steps, first: 0};
            const strength = Math.min(hostNumber(this.tab, "denoising_strength", 0.75), 0.999);
            const whole = opts.img2img_fix_steps ? Math.trunc(steps / strength) || 0 : steps;
            const run = (opts.img2img_fix_steps ? steps - 1 : Math.trunc(strength * steps)) + 1;
            return this.values.hires === "restart" ? {steps: run, first: 0} : {steps: Math.max(whole, run), first: Math.max(whole - run, 0)};
        }

        planned() {
            const seed = hostNumber(this.tab, "seed", -1), {steps, first} = this.course();
            const settings = this.settingsOf(this.values, steps, Math.max(0, Math.trunc(seed)));
            if (settings.problem) return settings;
            const plan = this.planOf(this.pair, this.pairKey, settings);
            if (!plan.rows) return !plan.problem && this.lastPlan && this.lastPlan.pair === this.pair ? this.lastPlan : plan;
            const rows = plan.rows.map((row, step) => step < first ? new Uint8Array(row.length).fill(klora.NOT_RUN) : row);
            const unknown = this.constants.seeded.includes(settings.method) && seed < 0 ? ", here with seed 0: the true one is drawn at Generate" : "";
            this.lastPlan = {...plan, rows, pair: this.pair, method: settings.method, names: this.names, title: this.titleOf(settings, plan.gamma) + unknown};
            return this.lastPlan;
        }

        /** {rows, s, gamma} of a pair: by the method's own rule where the page has it, else as the server says; rows is null until it has said it. */
        planOf(pair, pairKey, settings) {
            const {alphaM, comparisons, levels} = this.constants, rule = comparisons[settings.method];
            const s = klora.scheduleValues(settings, alphaM), gamma = klora.gammaOf(pair, settings.gamma);
            if (rule) return {rows: klora.compared(rule, pair, s, gamma, levels), s, gamma};
            const [names, kScale] = JSON.parse(pairKey), seed = this.constants.seeded.includes(settings.method) ? settings.seed : 0;
            const asked = {...names, k_scale: kScale, ...settings, seed}, key = JSON.stringify(asked), told = this.plans.get(key);
            if (!told) this.wanted.set(key, asked);
            return {rows: told && !told.problem ? told : null, problem: told && told.problem, s, gamma};
        }

        /** Ask for one of the plans that the last drawing lacked, and draw again: that asks for the next. */
        async loadPlan() {
            const [key, asked] = this.wanted.entries().next().value;
            let wait = 0;
            this.askingPlan = true;
            try {
                const found = await ask("strengths", asked);
                if (found.again) wait = TRY_AGAIN;
                else this.plans.set(key, found.problem ? found : klora.rowsOf(found, this.constants.levels));
                if (this.plans.size > MOST_PLANS) this.plans.delete(this.plans.keys().next().value);
            } catch {
                wait = TRY_AGAIN;
            }
            setTimeout(() => {
                this.askingPlan = false;
                this.redraw();
            }, wait);
        }

        titleOf({method, schedule, alpha, beta, steps}, gamma) {
            const sum = `${klora.short(alpha)} t/T ${beta < 0 ? "−" : "+"} ${klora.short(Math.abs(beta))}`;
            const s = schedule === "s*" ? `S* = (${sum}) mod ${this.constants.alphaM}` : `S = ${sum}`;
            return `${method}, ${s}, γ ${klora.short(gamma)}, ${steps} steps`;
        }

        drawChoices(applied) {
            const choice = (text, pressed, act) => {
                const button = klora.element("button", {type: "button", class: "klora-choice", "aria-pressed": String(pressed)}, text);
                button.addEventListener("click", () => {
                    act();
                    this.draw();
                });
                return button;
            };
            const batches = new Set(this.passes.map(pass => pass.batch)).size;
            const nameOf = pass => ["applied", batches > 1 ? `batch ${pass.batch + 1}` : "", pass.pass === "hires" ? "hires pass" : ""].filter(Boolean).join(", ");
            this.choices.replaceChildren(choice("planned", this.shown === "planned", () => {
                this.shown = "planned";
            }), ...(applied ? this.passes : []).map((pass, i) => choice(nameOf(pass), this.shown === "applied" && this.passIndex === i, () => {
                this.shown = "applied";
                this.passIndex = i;
            })));
        }

        /** The host has made an image: what was recorded of it, if K-LoRA took part. */
        generated(text) {
            let info;
            try {
                info = JSON.parse(text);
            } catch {
                return;
            }
            this.info = info;
            this.passes = (info.extra_generation_params || {})["K-LoRA applied"] || [];
            this.passIndex = 0;
            if (this.passes.length) this.shown = "applied";
            this.redraw();
        }

        /** The recorded pass that is chosen, as the map draws it; null where there is none or its layers are not known here. */
        applied() {
            const pass = this.passes[this.passIndex];
            if (!pass) return null;
            const params = this.info.extra_generation_params, values = {...this.constants.defaults};
            for (const [name, labels] of Object.entries(this.constants.infotext)) {
                const label = labels.find(one => one in params);
                if (label) values[name] = decoded(String(params[label]));
            }
            const [pairKey, pair] = this.pairOf(pass, values);
            if (!pair) return null;
            const seed = (this.info.all_seeds || [0])[pass.batch * (this.info.batch_size || 1)] || 0;
            const settings = this.settingsOf(values, pass.steps, seed);
            const rows = klora.rowsOf(pass, this.constants.levels), view = {rows, pair, method: values.method, names: values};
            if (settings.problem) return {...view, s: null, gamma: null, title: "as applied"};
            const plan = this.planOf(pair, pairKey, settings);
            return {...view, s: plan.s, gamma: plan.gamma, title: this.verdict(rows, plan.rows)};
        }

        /** What is to be said of recorded rows, and how they compare with the planned ones, null while those are not known. */
        verdict(rows, planned) {
            const ran = rows.filter(row => row[0] !== klora.NOT_RUN).length;
            if (!planned) return `last image: ${ran} of ${rows.length} steps ran`;
            const other = rows.reduce((sum, row, step) => row[0] === klora.NOT_RUN ? sum : sum + row.filter((choice, layer) => choice !== planned[step][layer]).length, 0);
            return `last image: ${ran} of ${rows.length} steps ran, ${other ? `${other} choices other than planned` : "all as planned"}`;
        }

        /** [key, scores] of the pair that a recorded pass is of; empty where they are not known here. */
        pairOf(pass, {subject, style, k_scale}) {
            const key = JSON.stringify([{subject, style}, klora.readNumber(k_scale, this.constants.numbers.k_scale)]), pair = this.pairs.get(key);
            return pair && pair.layers && pair.layers.name.length === pass.layers ? [key, pair] : [];
        }

        /** Something on the page changed that may matter here. */
        look() {
            const info = (gradioApp().querySelector(`#generation_info_${this.tab} textarea`) || {}).value || "";
            if (info !== (this.seenInfo ?? "")) {
                this.seenInfo = info;
                this.generated(info);
            }
            const log = (gradioApp().querySelector(`#html_log_${this.tab}`) || {}).textContent;
            if (this.seenLog !== log) {
                this.seenLog = log;
                if (this.card && !this.card.checkpoint) this.refresh(DEBOUNCE);
            }
            const checkpoint = (gradioApp().querySelector("#setting_sd_model_checkpoint input") || {}).value + opts.sd_model_checkpoint;
            if (this.seenCheckpoint !== checkpoint) {
                this.seenCheckpoint = checkpoint;
                if (this.card) this.refresh();
            }
            const fields = ["steps", "seed", "denoising_strength"].map(name => hostNumber(this.tab, name, null)).join();
            if (this.seenFields !== fields) {
                this.seenFields = fields;
                if (this.card) this.redraw();
            }
        }
    }

    /** Called by the page whenever a control of the panel changes, with the values of all by name. */
    klora.changed = function(tab, names, values) {
        const panel = panelOf(tab);
        if (panel) panel.changed(Object.fromEntries(names.map((name, i) => [name, values[i]])));
        return [];
    };

    function panelOf(tab) {
        const root = gradioApp().querySelector(`#klora_${tab}_view [data-constants]`);
        if (root && (!panels[tab] || panels[tab].root !== root)) panels[tab] = new Panel(tab, root);
        return panels[tab];
    }

    const look = () => TABS.forEach(tab => panels[tab] && panels[tab].look());

    if (globalThis.onUiLoaded) {
        onUiLoaded(() => {
            TABS.forEach(panelOf);
            const own = TABS.map(tab => ["steps", "seed", "denoising_strength"].map(name => `#${tab}_${name}`)).flat().join();
            gradioApp().addEventListener("input", event => {
                if (event.target.closest(own)) look();
                else if (event.target.closest(TABS.map(tab => `#${tab}_prompt`).join())) TABS.forEach(tab => panels[tab] && panels[tab].markWords());
            });
        });
        onAfterUiUpdate(look);
    }
})(globalThis.klora = globalThis.klora || {});
