import { Dashboard } from "./node_modules/@grafana/schema/dist/esm/raw/dashboard/x/dashboard_types.gen";
import * as Stat from "./node_modules/@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import * as Gauge from "./node_modules/@grafana/schema/dist/esm/raw/composable/gauge/panelcfg/x/GaugePanelCfg_types.gen";
import * as Series from "./node_modules/@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";
import * as Table from "./node_modules/@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
export interface Grafana {
  dashboard: Dashboard;
  options: { stat: Partial<Stat.Options>; gauge: Partial<Gauge.Options>; timeseries: Partial<Series.Options>; table: Partial<Table.Options>; };
  custom: { timeseries: Partial<Series.FieldConfig>; table: Partial<Table.FieldConfig>; };
}
