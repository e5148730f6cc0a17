// Tooltips of the K-LoRA controls, from the one declaration of the settings.
(function () {
    function addTooltips(schema) {
        for (const tab of ["txt2img", "img2img"]) {
            for (const [name, property] of Object.entries(schema.properties)) {
                const element = gradioApp().querySelector(`#klora_${tab}_${name}`);
                if (element) {
                    element.title = property.description;
                }
            }
        }
    }

    onUiLoaded(async function () {
        const answer = await fetch("./klora/v1/schema");
        if (answer.ok) {
            addTooltips(await answer.json());
        }
    });
})();
