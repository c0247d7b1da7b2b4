// Renders one text/template with several sets of values, as Ollama renders a TEMPLATE: the same
// option, the same function names. JSON in, JSON out.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type asked struct {
	Template string           `json:"template"`
	Values   []map[string]any `json:"values"`
}

type made struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

func main() {
	var a asked
	if err := json.NewDecoder(os.Stdin).Decode(&a); err != nil {
		panic(err)
	}
	functions := template.FuncMap{
		"json": func(v any) string {
			b, _ := json.Marshal(v)
			return string(b)
		},
	}
	t, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(a.Template)
	out := make([]made, len(a.Values))
	for i, values := range a.Values {
		var b bytes.Buffer
		e := err
		if e == nil {
			e = t.Execute(&b, values)
		}
		if e != nil {
			out[i].Error = e.Error()
		}
		out[i].Text = b.String()
	}
	if err := json.NewEncoder(os.Stdout).Encode(out); err != nil {
		panic(err)
	}
}
