"use strict";

/* Who is chosen on each layer at each step: klora.core.schedule, klora.core.selectors and klora.core.plan in the browser, bit for bit. */
(function(klora) {
    const STYLE = 0, SUBJECT = 1, BOTH = 2, NOT_RUN = 3;

    /** The nearest whole number, halves to the even one, as numpy.rint. */
    function rint(x) {
        const low = Math.floor(x), rest = x - low;
        return rest < 0.5 || (rest === 0.5 && low % 2 === 0) ? low : low + 1;
    }

    /** numpy.round(x, 12). */
    function rounded(x) {
        return rint(x * 1e12) / 1e12;
    }

    /** The remainder with the sign of the divisor, as in Python. */
    function modulo(a, b) {
        const rest = a % b;
        return rest !== 0 && (rest < 0) !== (b < 0) ? rest + b : rest;
    }

    /** S(t) of every step, eq. (7), or S*(t), eq. (12). */
    function scheduleValues({schedule, alpha, beta}, steps, alphaM) {
        return Float64Array.from({length: steps}, (_, step) => {
            const s = rounded(alpha * (step / steps) + beta);
            return schedule === "s*" ? rounded(modulo(s, alphaM)) : s;
        });
    }

    /** Doubles in [0, 1) of numpy.random.RandomState(seed).random_sample: the Mersenne Twister MT19937. */
    function randomState(seed) {
        const N = 624, M = 397, state = new Uint32Array(N);
        state[0] = Number(BigInt(seed) % 4294967296n);
        for (let i = 1; i < N; i++) {
            state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
        }
        let next = N;

        function word() {
            if (next === N) {
                for (let i = 0; i < N; i++) {
                    const y = (state[i] & 0x80000000) | (state[(i + 1) % N] & 0x7fffffff);
                    state[i] = state[(i + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
                }
                next = 0;
            }
            let y = state[next++];
            y ^= y >>> 11;
            y ^= (y << 7) & 0x9d2c5680;
            y ^= (y << 15) & 0xefc60000;
            return (y ^ (y >>> 18)) >>> 0;
        }

        return () => {
            const high = word() >>> 5, low = word() >>> 6;
            return (high * 67108864 + low) / 9007199254740992;
        };
    }

    function rowsOf(steps, layers, choose) {
        return Array.from({length: steps}, (_, step) => Uint8Array.from({length: layers}, (_, layer) => choose(step, layer)));
    }

    /** Subject where its magnitude >= style's times factor[step]; one-sided layers to the one that has them. */
    function compare(layers, [subject, style], factor, steps) {
        return rowsOf(steps, subject.length, (step, layer) => {
            const only = layers.only[layer];
            return only ? +(only === "subject") : +(subject[layer] >= style[layer] * factor[step]);
        });
    }

    const topK = layers => [layers.subject_score, layers.style_score];
    const frobenius = layers => [layers.subject_frobenius, layers.style_frobenius];
    const alike = (layers, steps, choose) => rowsOf(steps, layers.name.length, choose);
    const constant = (steps, value) => new Float64Array(steps).fill(value);

    /** Selector -> choices from the layers' scores and {s, gamma, steps, seed}. */
    const SELECTORS = {
        "K-LoRA": (layers, {s, gamma, steps}) => compare(layers, topK(layers), s.map(value => gamma * value), steps),
        "Top-K only": (layers, {steps}) => compare(layers, topK(layers), constant(steps, 1), steps),
        "Top-K with γ": (layers, {gamma, steps}) => compare(layers, topK(layers), constant(steps, gamma), steps),
        "Fixed": (layers, {s, steps}) => alike(layers, steps, step => +(s[step] <= 1)),
        "Random": (layers, {steps, seed}) => {
            const draw = randomState(seed);
            return alike(layers, steps, () => +(draw() < 1 / 3));
        },
        "Frobenius": (layers, {s, gamma, steps}) => compare(layers, frobenius(layers), s.map(value => gamma * value), steps),
        "LoRA Switch": (layers, {steps}) => alike(layers, steps, step => +(step % 2 === 0)),
        "Direct merge": (layers, {steps}) => alike(layers, steps, () => BOTH),
        "Subject only": (layers, {steps}) => alike(layers, steps, () => SUBJECT),
        "Style only": (layers, {steps}) => alike(layers, steps, () => STYLE),
    };

    /** Selectors whose choice moves with S(t). */
    const LOOK_AT_S = ["K-LoRA", "Fixed", "Frobenius"];

    /**
     * The plan of a scored pair.
     * @param pair the answer of /klora/internal/scores
     * @param settings {selector, schedule, alpha, beta, gamma, steps, seed}; gamma is "auto", "off" or a number
     * @returns {rows: one Uint8Array a step, s: S(t) of every step, gamma: in force}
     */
    function makePlan(pair, settings, alphaM) {
        const steps = settings.steps;
        const gamma = settings.gamma === "auto" ? pair.gamma : settings.gamma === "off" ? 1 : settings.gamma;
        const s = scheduleValues(settings, steps, alphaM);
        return {rows: SELECTORS[settings.selector](pair.layers, {s, gamma, steps, seed: settings.seed}), s, gamma};
    }

    /** The two magnitudes that a selector compares on a layer, null where it compares none. */
    function magnitudes(layers, layer, selector) {
        const pair = selector === "Frobenius" ? frobenius(layers) : topK(layers);
        return layers.only[layer] ? null : {subject: pair[0][layer], style: pair[1][layer]};
    }

    /** The rows of a recorded pass: of each step a string of digits, a choice a layer, or null where it did not run. */
    function recordedRows(pass, layers) {
        return pass.rows.map(row => row === null ? new Uint8Array(layers).fill(NOT_RUN) : Uint8Array.from(row, Number));
    }

    /** Share of the layers that the subject holds in a row, a shared one counting half; null where the step did not run. */
    function subjectShare(row, members = [...row.keys()]) {
        if (!members.length || row[members[0]] === NOT_RUN) return null;
        const held = members.reduce((sum, layer) => sum + (row[layer] === SUBJECT ? 1 : row[layer] === BOTH ? 0.5 : 0), 0);
        return held / members.length;
    }

    /** The steps at which a layer's choice differs from the step before. */
    function switchesOf(rows, layer) {
        return [...rows.keys()].filter(step => step > 0 && rows[step][layer] !== rows[step - 1][layer]);
    }

    /** A number as the settings take it: one of its words, or within its bounds; undefined for anything else. */
    function readNumber(text, {words, bounds}) {
        const plain = String(text).trim().toLowerCase();
        if (words.includes(plain)) return plain;
        if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/.test(plain)) return undefined;
        const number = Number(plain);
        return bounds[0] <= number && number <= bounds[1] ? number : undefined;
    }

    Object.assign(klora, {
        STYLE, SUBJECT, BOTH, NOT_RUN, SELECTORS, LOOK_AT_S, makePlan, magnitudes, recordedRows, subjectShare, switchesOf, readNumber,
    });
})(globalThis.klora = globalThis.klora || {});
